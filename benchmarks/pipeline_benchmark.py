"""`kvferry bench pipeline` as a script: paged GPU cache to pinned host slots and back, on real KV.

python -m benchmarks.pipeline_benchmark --kv kv.safetensors --output results.json
"""

import typer

from kvferry.cli.bench_pipeline import pipeline

if __name__ == "__main__":
    typer.run(pipeline)
