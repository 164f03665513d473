"""How the Hopper W4A16 kernels cut a product into programs: a table of measured shapes, else a rule.

The rule models the time of a schedule from a few constants measured on an H100 and takes the fastest. It
never runs anything: the first call of a new shape compiles one kernel.
"""

import json
import os
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ConfigError

# Names a file of schedules, made by `hadacore tune`, that go before the shipped ones.
TUNING_VARIABLE = "HADACORE_TUNING"
MAX_SKINNY_TOKENS = 16
# Schedules cover this many tokens at most; more tokens only mean more programs of the same kind.
_TOKEN_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_SHARED_MEMORY = 226_000
_MAX_SPLIT = 16
_MAX_PREFILL_SPLIT = 4
# Tiles of K that its tensor cores add up: they cut off what they add, so that errors grow with the number.
_MAX_PREFILL_TILES = 256
_H100_PROCESSORS = 132
_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
# (block_n, num_warps, stages) and (block_m, stages, slots)
_SKINNY_CANDIDATES = ((128, 8, 3), (128, 8, 4), (128, 8, 6), (64, 4, 4), (64, 4, 6))
_WIDE_CANDIDATES = ((32, 4, 4), (32, 5, 6), (64, 3, 4), (64, 3, 6), (128, 1, 4), (128, 2, 4))
_TABLE = Path(__file__).with_name("w4a16_table.json")


class SkinnySchedule(NamedTuple):
    """Of `w4a16_skinny.skinny_kernel`.

    Attributes:
        block_m: tokens, 8 or 16.
        block_n: rows of weights of a program.
        tiles: tiles of K of a program, at least `stages`.
        stages: tiles of weights in flight.
        num_warps: warps of a program.
    """

    block_m: int
    block_n: int
    tiles: int
    stages: int
    num_warps: int


class WideSchedule(NamedTuple):
    """Of `w4a16_wide.wide_kernel`; a program has 128 rows of weights.

    Attributes:
        block_m: tokens of a program: 16, 32, 64 or 128.
        tiles: tiles of K of a program.
        stages: tiles of weights in flight.
        slots: tiles of x in the ring.
    """

    block_m: int
    tiles: int
    stages: int
    slots: int

    @property
    def is_half(self) -> bool:
        """Whether two programs share a processor's registers."""
        return self.block_m == 16 or (self.block_m == 32 and self.stages == 1)


class PrefillSchedule(NamedTuple):
    """Of `w4a16_prefill.prefill_kernel`; a program has 256 rows of weights.

    Attributes:
        block_m: tokens of a program: 128, or with experts 64.
        tiles: tiles of K of a program.
        slots: tiles of x in the ring.
    """

    block_m: int
    tiles: int
    slots: int


Schedule = SkinnySchedule | WideSchedule | PrefillSchedule

# Schedules, without `tiles`, for many slots of experts, and microseconds of a processor for a tile of K and
# for a program besides; two programs that share a processor have half each. Modelled after products with one
# weight, on an H100; `scripts/check_experts_prefill_gpu.py --tune` compares their choice with the fastest.
GROUPED_TIMES: dict[WideSchedule | PrefillSchedule, tuple[float, float]] = {
    WideSchedule(16, 0, 2, 4): (0.43, 1.35),
    WideSchedule(32, 0, 1, 4): (0.42, 1.3),
    WideSchedule(32, 0, 4, 4): (0.52, 2.5),
    WideSchedule(64, 0, 3, 4): (0.62, 2.5),
    WideSchedule(128, 0, 1, 4): (1.0, 2.5),
    PrefillSchedule(64, 0, 4): (1.05, 2.5),
    PrefillSchedule(128, 0, 4): (1.75, 2.5),
}


def bucket(m: int) -> int:
    """The smallest number of tokens of the table that is not below m; the largest for more."""
    return next((tokens for tokens in _TOKEN_BUCKETS if tokens >= m), _TOKEN_BUCKETS[-1])


def choose(m: int, n: int, k: int, arch: str, processors: int, is_plain: bool = True) -> Schedule:
    """The schedule for a product, from the table or by the rule.

    Args:
        m: tokens, at least 1.
        n, k: outputs and inputs, multiples of 64 and 128.
        arch: of the GPU, e.g. "sm90".
        processors: streaming multiprocessors of the GPU.
        is_plain: whether groups have at least 128 inputs. Else two programs of the wide kernel would not fit
            a processor's registers.
    """
    known = _table().get(f"{arch} {n}x{k} {bucket(m)}")
    schedule = known if known is not None else _choose_by_rule(bucket(m), n, k // 128, processors)
    if not is_plain and m <= MAX_SKINNY_TOKENS and not isinstance(schedule, SkinnySchedule):
        return choose_skinny(bucket(m), n, k // 128, processors)
    return schedule


def candidates(m: int, n: int, k: int) -> list[Schedule]:
    """The schedules that `hadacore tune` measures for a product.

    Args:
        m, n, k: as in `choose`.
    """
    k_tiles = k // 128
    found: set[Schedule] = {_choose_by_rule(bucket(m), n, k_tiles, _H100_PROCESSORS)}
    for split in _SPLITS:
        tiles = -(-k_tiles // split)
        if 8 < m <= MAX_SKINNY_TOKENS and 96 <= -(-n // 128) * split <= 300:
            found.add(WideSchedule(16, tiles, 2, 4))
        if m <= MAX_SKINNY_TOKENS:
            block_m = 8 if m <= 8 else 16
            for block_n, num_warps, stages in _SKINNY_CANDIDATES:
                fits = stages <= tiles and tiles * block_m * 256 <= _SHARED_MEMORY // 2
                if fits and 96 * block_n <= n * split <= 800 * block_n:
                    found.add(SkinnySchedule(block_m, block_n, tiles, stages, num_warps))
        else:
            for block_m, stages, slots in _WIDE_CANDIDATES:
                programs = -(-n // 128) * -(-m // block_m) * split
                if block_m < 2 * m and (split == 1 or programs <= 300):
                    found.add(WideSchedule(block_m, tiles, stages, slots))
        if m > 64 and split <= _MAX_PREFILL_SPLIT and tiles <= _MAX_PREFILL_TILES:
            found.add(PrefillSchedule(128, tiles, 4))
    return sorted(found)


@cache
def _choose_by_rule(m: int, n: int, k_tiles: int, processors: int) -> Schedule:
    if m <= MAX_SKINNY_TOKENS:
        # Two programs of the wide kernel a processor, if there are as many and each has some tiles.
        split = 2 * processors // -(-n // 128)
        if m > 8 and 1 <= split <= min(_MAX_SPLIT, k_tiles // 8):
            return WideSchedule(16, -(-k_tiles // split), 2, 4)
        return choose_skinny(m, n, k_tiles, processors)
    # Sums of 128 tokens do not fit into the registers beside those of another program.
    schedules: list[WideSchedule | PrefillSchedule] = [
        _wide(block_m, -(-k_tiles // split))
        for block_m in (32, 64, 128)
        for split in range(1, 9 if block_m < 128 else 2)
    ]
    prefill = [PrefillSchedule(128, -(-k_tiles // split), 4) for split in range(1, _MAX_PREFILL_SPLIT + 1)]
    schedules += [schedule for schedule in prefill if schedule.tiles <= _MAX_PREFILL_TILES]
    return min(schedules, key=lambda schedule: _time(schedule, m, n, k_tiles, processors))


@cache
def choose_skinny(m: int, n: int, k_tiles: int, processors: int) -> SkinnySchedule:
    """About two programs of eight warps for each processor, with a slice of x that leaves room for both.

    Args:
        m: tokens, at most `MAX_SKINNY_TOKENS`.
        n: outputs.
        k_tiles: tiles of 128 inputs.
        processors: as in `choose`.
    """
    block_m = 8 if m <= 8 else 16
    row_tiles = -(-n // 128)
    most = _SHARED_MEMORY // 2 // (block_m * 256)
    split = max(1, min(2 * processors // row_tiles, k_tiles // 4, _MAX_SPLIT), -(-k_tiles // most))
    tiles = -(-k_tiles // split)
    stages = min(tiles, 3 if block_m == 16 or tiles < 8 else 4)
    return SkinnySchedule(block_m, 128, tiles, stages, 8)


def _wide(block_m: int, tiles: int) -> WideSchedule:
    stages, slots = {32: (4, 4), 64: (3, 4), 128: (1, 4)}[block_m]
    return WideSchedule(block_m, tiles, stages, slots)


def _time(schedule: WideSchedule | PrefillSchedule, m: int, n: int, k_tiles: int, processors: int) -> float:
    """Modelled microseconds: programs take turns on the processors; a tile takes a time of its own."""
    rows, tile_time = 128, {32: 0.52, 64: 0.62, 128: 1.0}[schedule.block_m]
    if isinstance(schedule, PrefillSchedule):
        rows, tile_time = 256, 1.75
    split = -(-k_tiles // schedule.tiles)
    programs = -(-n // rows) * -(-m // schedule.block_m) * split
    turns = -(-programs // processors)
    exchange = 0.0 if split == 1 else 1.5 + 8 * m * n * split / 2.5e6
    return turns * (schedule.tiles * tile_time + 2.5) + exchange


@cache
def choose_grouped(
    slots: int, experts: int, n: int, k_tiles: int, is_plain: bool = True
) -> WideSchedule | PrefillSchedule:
    """The fastest schedule of `GROUPED_TIMES` for the products of many slots with their experts.

    Args:
        slots, experts, n: S, E and N.
        k_tiles: tiles of 128 inputs.
        is_plain: whether groups have at least 128 inputs, see `choose`.
    """

    def time(kind: WideSchedule | PrefillSchedule) -> float:
        tile_time, program_time = GROUPED_TIMES[kind]
        # Blocks of an expert with from none to twice the mean number of slots, each as likely as any other.
        most = 2 * slots / (experts * kind.block_m)
        whole = int(most)
        blocks = (whole + 1) * (most - whole / 2) / most
        row_tiles = -(-n // (256 if isinstance(kind, PrefillSchedule) else 128))
        return blocks * row_tiles * (k_tiles * tile_time + program_time)

    kinds = [k for k in GROUPED_TIMES if is_plain or isinstance(k, PrefillSchedule) or not k.is_half]
    return min(kinds, key=time)._replace(tiles=k_tiles)


@cache
def _table() -> dict[str, Schedule]:
    """The shipped schedules and, over them, those of the file that `TUNING_VARIABLE` names."""
    own = os.environ.get(TUNING_VARIABLE)
    files = [_TABLE, Path(own)] if own else [_TABLE]
    return {key: schedule for file in files for key, schedule in read_table(file).items()}


def read_table(file: Path) -> dict[str, Schedule]:
    """The schedules of a tuning file.

    Args:
        file: JSON, as `write_table` writes it.

    Raises:
        ConfigError: the file cannot be read, or an entry is no schedule.
    """
    try:
        entries = json.loads(file.read_text("utf-8"))["schedules"]
        return {key: _parse(value) for key, value in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file}: is not a file of W4A16 schedules: {error!r}") from None


def write_table(file: Path, schedules: dict[str, Schedule], about: dict[str, Any]) -> None:
    """Write a tuning file.

    Args:
        file: replaced as a whole.
        schedules: by ``"<arch> <N>x<K> <tokens>"``.
        about: device, versions, date.
    """
    entries = {key: {type(value).__name__: value._asdict()} for key, value in sorted(schedules.items())}
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps({**about, "schedules": entries}, indent=1) + "\n")
    partial.replace(file)


def _parse(entry: dict[str, dict[str, int]]) -> Schedule:
    ((name, values),) = entry.items()
    kinds: dict[str, Any] = {kind.__name__: kind for kind in (SkinnySchedule, WideSchedule, PrefillSchedule)}
    schedule: Schedule = kinds[name](**values)
    allowed = {
        "block_m": {SkinnySchedule: (8, 16), WideSchedule: (16, 32, 64, 128), PrefillSchedule: (128,)}[
            type(schedule)
        ],
        "block_n": (64, 128),
        "num_warps": (4, 8),
        "stages": range(1, 9),
        "slots": range(2, 9),
        "tiles": range(1, 1 << 20),
    }
    for option, value in schedule._asdict().items():
        if type(value) is not int or value not in allowed[option]:
            raise ValueError(f"{option} is {value!r}")
    return schedule
