"""Sizes in bytes, as text."""

UNITS = {"GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10, "B": 1}


def parse_size(text: str) -> int:
    """Bytes of "4096", "64KiB", "1 MiB", "1GiB". Raises `ValueError` for anything else."""
    number, unit = text.strip(), "B"
    for name in UNITS:
        if number.lower().endswith(name.lower()):
            number, unit = number[: -len(name)].strip(), name
            break
    if not number.isdecimal() or int(number) < 1:
        raise ValueError(f"{text!r} is no size: give whole bytes, or KiB, MiB, GiB (64KiB, 1GiB)")
    return int(number) * UNITS[unit]


def format_size(num_bytes: int) -> str:
    """The largest unit that gives a whole number: "64 KiB"."""
    unit = next(name for name, size in UNITS.items() if num_bytes % size == 0)
    return f"{num_bytes // UNITS[unit]} {unit}"
