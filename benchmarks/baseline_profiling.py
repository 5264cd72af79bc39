"""`kvferry bench baseline` as a script: copies between host and GPU.

python -m benchmarks.baseline_profiling --device-id 0 --tensor-sizes 4KiB,1MiB,1GiB --iterations 30 --output FILE
"""

import typer

from kvferry.cli.bench import baseline

if __name__ == "__main__":
    typer.run(baseline)
