"""The named optimizers: one per rule, with the reference's keywords. Written by `make optimizers`."""

from .adam import Adam, AdamW
from .channels import AdamAWD, AdamGCC, StableAdam
from .curvature import BAdam, DuvAdam, SUAdam
from .lamb import LAMB
from .nadam import NAdam
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
    "AdamAWD",
    "AdamGCC",
    "AdamW",
    "BAdam",
    "DuvAdam",
    "Momentum",
    "NAdam",
    "PreLAMB",
    "Prodigy",
    "RAdam",
    "RMSprop",
    "SAdam",
    "SRAdam",
    "SUAdam",
    "StableAdam",
]
