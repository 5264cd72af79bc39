"""What can be tuned of the pipeline."""

from dataclasses import dataclass, fields

_WORD = 4


@dataclass(frozen=True)
class Settings:
    """Sizes that trade memory for overlap, checked once. `ValueError` for anything below 1.

    `ring_bytes`: device memory of each direction's staging ring. Bites, in raw bytes: the smallest
    (`first_bite_bytes`), the largest (`bite_bytes`), and how much each is larger than the next smaller one (`growth`).
    `table_bytes`: page tables in flight, in each direction, pinned and again on the device. `jobs_in_flight`: jobs
    (parts of them, where they are large) that one direction gives to the device before it keeps the next waiting.
    `timing`: measure each bite's stages.
    """

    # Two of the largest bites at a ratio of 4: one that is coded, one on the wire.
    ring_bytes: int = 128 << 20
    first_bite_bytes: int = 32 << 20
    bite_bytes: int = 256 << 20
    # Coders are about 4 times as fast as the wire carries what they make, at a ratio of 4.
    growth: int = 4
    table_bytes: int = 4 << 20
    jobs_in_flight: int = 16
    timing: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "timing" and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{field.name}={value!r}: give a whole number, at least 1")
        if self.first_bite_bytes > self.bite_bytes:
            raise ValueError(
                f"first_bite_bytes={self.first_bite_bytes} is more than bite_bytes={self.bite_bytes}: bites grow from "
                "the first to the second"
            )

    def table_rows(self, chunk_pages: int) -> int:
        """Chunks whose page tables fit into `table_bytes`; at least 16."""
        return max(16, self.table_bytes // (_WORD * (chunk_pages + 9)))
