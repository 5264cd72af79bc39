"""`kvferry doctor`: what is installed, what each piece enables, and whether the codecs work here."""

import importlib.metadata
import platform

import typer

import kvferry

ENABLES = {
    "torch": "everything",
    "cuda-bindings": "GPU kernels, compiled at run time; copies between host and GPU",
    "nvidia-cuda-nvrtc": "the compiler of the GPU kernels",
    "transformers": "HostStore.put_cache and restore_cache, kvferry demo",
    "safetensors": "profiles of calibrated models",
    "vllm": "kvferry serve; see docs/vllm.md for versions",
    "matplotlib": "the demo's plot",
}


def doctor() -> None:
    """Print what is installed and run a round trip of every codec that needs no profile. Exit code 1 if one fails."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    grid = Table(show_edge=False, pad_edge=False, header_style="bold")
    for heading in ("what", "found", "enables"):
        grid.add_column(heading)
    grid.add_row("kvferry", kvferry.__version__, "")
    grid.add_row("python", platform.python_version(), "")
    for package, enables in ENABLES.items():
        grid.add_row(package, _version(package) or "not installed", enables)
    grid.add_row("CUDA device", _cuda_device() or "none", "GPU codecs; without one the CPU reference is used")
    console.print(grid)
    console.print()
    failures = 0
    for device in ["cpu", *(["cuda"] if _cuda_device() else [])]:
        for name, problem in self_test(device):
            failures += problem is not None
            style = "bold red" if problem else None
            console.print(f"{device:5} {name:32} {problem or 'ok'}", style=style, markup=False)
    if failures:
        raise typer.Exit(1)


def self_test(device: str) -> list[tuple[str, str | None]]:
    """Round trips on `device` of every built-in codec and packer but `transform`: `(name, None or what went wrong)`."""
    import torch

    values = torch.randn(2, 100, 96, generator=torch.Generator().manual_seed(0)).cumsum(1).to(device, torch.bfloat16)
    codecs: list[kvferry.Raw | kvferry.Lossless | kvferry.Bounded] = [kvferry.Raw()]
    codecs += [kvferry.Lossless(packing=packing) for packing in ("ans", "bitpack")]
    codecs += [
        kvferry.Bounded(error_bound=0.125, relative=False, mode=mode, packing=packing)
        for mode in ("fixed", "plain", "outlier")
        for packing in ("ans", "bitpack")
    ]
    found: list[tuple[str, str | None]] = []
    for codec in codecs:
        name = " ".join(str(getattr(codec, part)) for part in ("name", "mode", "packing") if hasattr(codec, part))
        try:
            back = kvferry.decompress(kvferry.compress(values, codec), device=device)
            error = float((back.double() - values.double()).abs().max())
            allowed = 0.125 if isinstance(codec, kvferry.Bounded) else 0.0
            found.append((name, None if error <= allowed else f"error {error:g} exceeds {allowed:g}"))
        except Exception as problem:  # a self-test reports whatever goes wrong
            found.append((name, f"{type(problem).__name__}: {problem}"))
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cuda_device() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
