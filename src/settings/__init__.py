"""Settings: what a file and the command line say, parsed once into frozen typed objects."""

from .checks import explicit_keys, given_on_command_line, ineffective, is_placeholder, require, to_yaml, value_of
from .data_schema import DataSettings, EvaluationSettings, ExpectedSettings, SchedulerSettings
from .finetune_schema import DistillationSettings
from .help import help_text
from .load import from_command_line, load
from .model_schema import BudgetSettings, CompressionSettings, GroupSettings, LayerSpec, ModelSettings, PermutationSpec
from .schema import Settings

__all__ = [
    "BudgetSettings",
    "CompressionSettings",
    "DataSettings",
    "DistillationSettings",
    "EvaluationSettings",
    "ExpectedSettings",
    "GroupSettings",
    "LayerSpec",
    "ModelSettings",
    "PermutationSpec",
    "SchedulerSettings",
    "Settings",
    "explicit_keys",
    "from_command_line",
    "given_on_command_line",
    "help_text",
    "ineffective",
    "is_placeholder",
    "load",
    "require",
    "to_yaml",
    "value_of",
]
