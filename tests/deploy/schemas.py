"""What the manifests are validated against: the CRDs' schemas in tests/data, made strict, and Kubernetes' own."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate

SCHEMAS = Path(__file__).parents[1] / "data" / "schemas"
KUBERNETES_VERSION = "1.33"
CUSTOM = {
    ("ray.io/v1", "RayCluster"): "raycluster.json",
    ("ray.io/v1", "RayJob"): "rayjob.json",
    ("monitoring.coreos.com/v1", "PodMonitor"): "podmonitor.json",
}
"""Kinds that Kubernetes does not know, and the files of their schemas."""

Document = dict[str, Any]


class InvalidManifestError(Exception):
    """A document is not what its kind's schema says; the message names the document, the place and what is wrong."""


def require_valid(document: Document) -> None:
    """Validate one document against the schema of its kind.

    Raises:
        InvalidManifestError: If it does not fit, or nothing is known of its kind.
    """
    name = f"{document.get('kind')} {document.get('metadata', {}).get('name')}"
    file = CUSTOM.get((document.get("apiVersion", ""), document.get("kind", "")))
    try:
        if file is None:
            kubernetes_validate.validate(document, KUBERNETES_VERSION, strict=True)
        else:
            _validator(file).validate(document)
    except kubernetes_validate.SchemaNotFoundError as error:
        raise InvalidManifestError(f"{name}: {error.message}") from error
    except jsonschema.ValidationError as error:
        raise InvalidManifestError(f"{name}: {error.json_path}: {error.message}") from error


@functools.cache
def _validator(file: str) -> Any:
    schema = json.loads((SCHEMAS / file).read_text())
    return jsonschema.Draft202012Validator(_strict(schema))


def _strict(schema: Any) -> Any:
    """A CRD's schema as Kubernetes reads it with strict field validation, in the words of JSON schema."""
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    strict = {key: _strict(value) for key, value in schema.items() if key not in ("properties", "$defs")}
    for key in ("properties", "$defs"):  # whose keys are names, not words of the schema
        if key in schema:
            strict[key] = {name: _strict(value) for name, value in schema[key].items()}
    if schema.get("x-kubernetes-int-or-string"):
        strict["type"] = ["integer", "string"]
    is_closed = "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields")
    return {"additionalProperties": False, **strict} if is_closed else strict
