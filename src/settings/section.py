"""What every section of the settings has in common."""

from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    model_validator,
)


class Section(BaseModel):
    """A frozen group of keys; unknown keys are errors, and an empty section (YAML null) means its defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _empty_means_defaults(cls, data: Any) -> Any:
        return {} if data is None else data


def empty_map(value: Any) -> Any:
    """YAML's null for a map without entries."""
    return {} if value is None else value
