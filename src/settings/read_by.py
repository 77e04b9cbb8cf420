"""Marks in the schema: which jobs on which tasks read a key. What has no mark is read by all."""

from dataclasses import dataclass

TRAIN, EVALUATE, COMPRESS = "train", "evaluate", "compress"
JOBS = (TRAIN, EVALUATE, COMPRESS)
CLASSIFICATION, DETECTION = "classification", "detection"
TASKS = (CLASSIFICATION, DETECTION)


@dataclass(frozen=True)
class ReadBy:
    """A mark of a key, or of a section for all keys in it: `Annotated[Natural, TRAINING]`. Of several marks all count.

    Attributes:
        jobs: `train`, `evaluate`, `compress`.
        tasks: `classification`, `detection`.
        but_not: pairs of a job and a task that do not read it although other jobs on the task do.
    """

    jobs: tuple[str, ...] = JOBS
    tasks: tuple[str, ...] = TASKS
    but_not: tuple[tuple[str, str], ...] = ()


TRAINING, EVALUATION = ReadBy(jobs=(TRAIN,)), ReadBy(jobs=(EVALUATE,))
COMPRESSING, COMPRESSION = ReadBy(jobs=(TRAIN, COMPRESS)), ReadBy(jobs=(COMPRESS,))
WITH_DATA = ReadBy(jobs=(TRAIN, EVALUATE))
"""What only commands read that run the network on a data set."""
IMAGES_IN_FOLDERS, COCO = ReadBy(tasks=(CLASSIFICATION,)), ReadBy(tasks=(DETECTION,))
WRITES_A_FOLDER = ReadBy(but_not=((EVALUATE, CLASSIFICATION),))
"""An evaluation of a classifier only logs what it finds."""
