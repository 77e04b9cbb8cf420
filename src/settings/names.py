"""The types of keys that hold a name from a registry."""

from typing import TYPE_CHECKING, TypeAlias

from ..compression.finetune.registry import OPTIMIZERS, SCHEDULES
from ..compression.permute.registry import SEARCHES, STEPS
from ..compression.quantize.registry import QUANTIZERS
from ..engines.registry import ENGINES
from ..tasks.coco.backends import BACKENDS
from .values import names_of

if TYPE_CHECKING:
    BackendName: TypeAlias = str
    EngineName: TypeAlias = str
    OptimizerName: TypeAlias = str
    QuantizerName: TypeAlias = str
    ScheduleName: TypeAlias = str
    SearchName: TypeAlias = str
    StepName: TypeAlias = str
else:
    BackendName = names_of(BACKENDS)
    EngineName = names_of(ENGINES, "auto")
    OptimizerName = names_of(OPTIMIZERS)
    QuantizerName = names_of(QUANTIZERS)
    ScheduleName = names_of(SCHEDULES)
    SearchName = names_of(SEARCHES)
    StepName = names_of(STEPS)
