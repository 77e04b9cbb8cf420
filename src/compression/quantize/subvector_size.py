"""The subvector length d of every kind of weight (`pw_subvector_size`, `fc_subvector_size`, `large_subvectors`)."""

from __future__ import annotations

from dataclasses import dataclass

from ...common.errors import PlanError
from .weights import WeightPlace


@dataclass(frozen=True)
class BlockRule:
    """Subvector lengths of the three kinds of weights."""

    fc_subvector_size: int = 4
    pw_subvector_size: int = 4
    large_subvectors: bool = False


def subvector_size(place: WeightPlace, rule: BlockRule, override: int | None = None) -> tuple[int, str | None]:
    """The subvector length d of a weight, and a note where the rule could not be followed.

    Convolutions with a kernel of one: `pw_subvector_size`. Other convolutions: the values of a kernel (h*w), or twice
    as many with large blocks (h*w where the channels cannot be paired). Everything else: `fc_subvector_size`. Where one
    of the two sizes does not divide a row, the nearest size that does is taken. `override` (layer_specs) replaces d,
    except for spatial convolutions.

    Raises:
        PlanError: `override` does not divide the row length, or is given for a spatial convolution.
    """
    area = place.kernel_area
    row = place.parameter.shape[1:].numel()
    if area > 1:
        return _of_kernel(place, rule, override, area, row)
    if override is not None:
        if row % override:
            raise PlanError(
                f"subvector size {override} does not divide its {row} inputs per output; possible sizes: "
                f"{', '.join(map(str, _divisors(row)))}"
            )
        return override, None
    wanted = rule.pw_subvector_size if place.is_convolution else rule.fc_subvector_size
    if row % wanted == 0:
        return wanted, None
    d = nearest_divisor(row, wanted)
    key = "pw_subvector_size" if place.is_convolution else "fc_subvector_size"
    return d, f"{key} {wanted} does not divide {row} inputs per output: subvectors of {d} are used"


def _of_kernel(
    place: WeightPlace, rule: BlockRule, override: int | None, area: int, row: int
) -> tuple[int, str | None]:
    if override is not None and override not in (area, 2 * area):
        raise PlanError(
            f"subvector_size {override} was given for a {'x'.join(map(str, place.host.kernel_size))} convolution, "
            f"whose subvectors have {area} (small blocks) or {2 * area} values (large blocks); use "
            "large_subvectors: True or False instead"
        )
    large = rule.large_subvectors if override is None else override == 2 * area
    if large and row % (2 * area):
        return (
            area,
            f"an odd number of channels ({row // area}) cannot be paired: small blocks (d = {area}) are used "
            "instead of large ones",
        )
    return (2 * area if large else area), None


def _divisors(row: int) -> list[int]:
    return [n for n in range(2, min(row, 32) + 1) if row % n == 0] or [1]


def nearest_divisor(row: int, wanted: int) -> int:
    """The divisor of `row` that is nearest to `wanted`; of two the smaller one, but rather not 1."""
    divisors = [n for n in range(1, min(row, 2 * wanted) + 1) if row % n == 0]
    return min(divisors, key=lambda n: (abs(n - wanted) + (n == 1), n))
