"""`kvferry bench codec` as a script: pages of real KV into slots and back, on one GPU.

python -m benchmarks.compression_benchmark --device-id 0 --tensor-size 512MiB --error-bound 0.2 --encoding-mode fixed \
    --iterations 100 --output results.json
"""

import typer

from kvferry.cli.bench_codec import codec

if __name__ == "__main__":
    typer.run(codec)
