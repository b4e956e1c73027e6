"""JSON Schema of plan files, for engines that read plans without this package.

Made from the records of `plan.py`, with what `plan_io.py` does to them in the file: each schedule
stands once, under `schedules`, and candidates name it.
"""

from __future__ import annotations

from typing import Any

from ..search_spaces.record_schema import json_schema
from .plan import SCHEMA, Plan


def plan_schema() -> dict[str, Any]:
    """The schema of files that `plan_io.dump_plan` writes, as a JSON document."""
    schema = json_schema(Plan, title="A plan of nanoflow-tune", schema_id=SCHEMA)
    properties, definitions = schema["properties"], schema["$defs"]
    properties["schema"] = {"const": SCHEMA, "description": "Version of this format."}
    properties["buckets"]["minItems"] = 1
    properties["schedules"] = {
        "type": "object",
        "minProperties": 1,
        "additionalProperties": definitions["Candidate"]["properties"]["schedule"],
        "description": "Every schedule that a candidate names, by that name.",
    }
    definitions["Candidate"]["properties"]["schedule"] = {
        "type": "string",
        "description": "Key of the schedule under `schedules`.",
    }
    for name in ("nano_batches", "nano_ops"):
        definitions["Schedule"]["properties"][name]["minItems"] = 1
    schema["required"] = ["schema", *schema["required"], "schedules"]
    return schema
