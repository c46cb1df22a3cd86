"""The named optimizers: one per rule, with the reference's keywords. Written by `make optimizers`."""

from .adam import Adam, AdamW
from .curvature import BAdam, DuvAdam, SUAdam
from .lamb import LAMB
from .normalized import UM, PreLAMB
from .prodigy import Prodigy
from .radam import RAdam
from .rmsprop import RMSprop
from .sgd import SGD, Momentum
from .softplus import SAdam, SRAdam

__all__ = [
    "LAMB",
    "SGD",
    "UM",
    "Adam",
    "AdamW",
    "BAdam",
    "DuvAdam",
    "Momentum",
    "PreLAMB",
    "Prodigy",
    "RAdam",
    "RMSprop",
    "SAdam",
    "SRAdam",
    "SUAdam",
]
