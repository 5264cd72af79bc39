"""Train the small Llama model that ships with kvferry, from one text file, in one command.

The demo and the quality tests need KV caches of trained weights on real text: random weights have no channel structure
to compress and no next-token distribution to damage. The model is small enough to keep in the repository. It is not
meant to write well.

Data order and initialisation depend only on the text, the seed and the number of steps. With ``--minutes`` that number
follows the machine's speed; ``training.json`` records it, and ``--steps`` repeats the run. GPU kernels add in varying
order, so a repeat agrees closely, not bit for bit.
"""

import hashlib
import itertools
import json
import lzma
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import transformers
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

END = "<|end|>"
END_ID = 0
DOCUMENT_SEPARATOR = "\n\0\n"
DATA_DESCRIPTION = "English text: novels and Python Enhancement Proposals (PEPs)"

VOCAB_SIZE = 2048
MAX_POSITIONS = 4096
MAX_FILE_BYTES = 5_000_000  # of model.safetensors: it lives in git

TOKENIZER_SAMPLE_CHARS = 12_000_000  # 1 to 2 s on two cores; 2048 merges do not get better with more
TOKENIZER_CHUNK_CHARS = 20_000

HELDOUT_SHARE = 0.03
EXCERPT_BYTES = 45_000  # per excerpt, two of them
POSITION_EDGES = (0, 16, 64, 256, 1024, 2048, MAX_POSITIONS)

PEAK_LEARNING_RATE = 3e-3
WARMUP_STEPS = 200
DECAY_SHARE = 0.4  # of the steps, linear to zero
LONG_SHARE = 0.15  # of the steps, on windows of twice the length: inside the decay, while the rate can still teach
WEIGHT_DECAY = 0.1
CLIP_NORM = 1.0

PROBE_WARMUP_STEPS = 3
PROBE_STEPS = 20
PROBE_MARGIN = 0.95  # of the time left is planned; the rest covers a GPU that slows down as it warms
PROGRESS_STEPS = 50
EVALUATION_WINDOWS = 8  # per forward pass

ATTENTION = "causal_sdpa"
GUTENBERG_BODY = re.compile(r"\*\*\* ?START OF[^\n]*\*\*\*\n(.*)\n\*\*\* ?END OF", re.DOTALL)


class BatchShape(NamedTuple):
    """How many windows one step reads, and how many tokens it predicts in each."""

    windows: int
    length: int


WindowLoss = Callable[[LlamaForCausalLM, torch.Tensor, torch.Tensor, int], torch.Tensor]


def causal_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Plain causal attention over whole windows.

    Under ``torch.compile`` the library's own ``sdpa`` materialises the causal mask, which rules out the flash kernel;
    without it, it looks for packed sequences and so waits for the device in every step. An implementation of another
    name gets no mask at all.
    """
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2), None


AttentionInterface.register(ATTENTION, causal_sdpa)


def read_documents(text: Path, max_docs: int | None) -> list[str]:
    """Read the documents, without Project Gutenberg's licence text around them.

    ``max_docs`` keeps that many of each kind for a smoke test: the shortest novels and the longest PEPs.
    """
    with lzma.open(text, "rt", encoding="utf-8", newline="") as file:
        documents = [document.strip() for document in file.read().split(DOCUMENT_SEPARATOR)]
    documents = [match[1].strip() if (match := GUTENBERG_BODY.search(document)) else document for document in documents]
    if max_docs is None:
        return documents
    novels = sorted((document for document in documents if not is_pep(document)), key=len)
    peps = sorted((document for document in documents if is_pep(document)), key=len, reverse=True)
    return novels[:max_docs] + peps[:max_docs]


def is_pep(document: str) -> bool:
    """Tell the two kinds of documents apart."""
    return document.startswith("PEP:")


def title(document: str) -> str:
    """Name a document for ``training.json``: a PEP's number and title, or a novel's first line."""
    first, second = [*document.split("\n", 2), ""][:2]
    if is_pep(document):
        return f"PEP {first.removeprefix('PEP:').strip()}: {second.removeprefix('Title:').strip()}"
    return first.strip()


def split_documents(documents: list[str]) -> tuple[list[str], list[str]]:
    """Split into training and held-out documents by a rule that does not depend on their order or on a seed.

    Of each kind, in the order of their hashes, every document that still fits into ``HELDOUT_SHARE`` of that kind's
    text is held out; where none fits, the shortest is.
    """
    training: list[str] = []
    heldout: list[str] = []
    for pep in (False, True):
        kind = sorted(
            (document for document in documents if is_pep(document) == pep),
            key=lambda document: hashlib.sha256(document.encode()).digest(),
        )
        if len(kind) < 2:
            raise ValueError(f"the text has {len(kind)} {'PEPs' if pep else 'novels'}; two are needed to hold one out")
        room = HELDOUT_SHARE * sum(map(len, kind))
        taken = []
        for document in kind:
            if len(document) <= room:
                taken.append(document)
                room -= len(document)
        taken = taken or [min(kind, key=len)]
        heldout += taken
        training += [document for document in kind if document not in taken]
    return training, heldout


def train_tokenizer(documents: list[str]) -> Tokenizer:
    """Train a byte-level BPE on evenly spaced chunks of the documents."""
    chunks = [
        document[start : start + TOKENIZER_CHUNK_CHARS]
        for document in documents
        for start in range(0, len(document), TOKENIZER_CHUNK_CHARS)
    ]
    every = math.ceil(sum(map(len, documents)) / TOKENIZER_SAMPLE_CHARS)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(chunks[::every], trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(f"the text yields {tokenizer.get_vocab_size()} tokens, not {VOCAB_SIZE}: give more text")
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """Write the two files that ``AutoTokenizer`` reads.

    The configuration is written by hand because the class name that the library writes is unknown to its older
    versions, while this one is known to all.
    """
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "pad_token": END,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_POSITIONS,
    }
    write_json(out / "tokenizer_config.json", config)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON as a person would read it."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def encode(tokenizer: Tokenizer, documents: list[str]) -> np.ndarray:
    """Encode the documents into one stream, with the separator before, between and after them."""
    end = np.array([END_ID], dtype=np.uint16)
    parts = [end]
    for encoding in tokenizer.encode_batch_fast(documents, add_special_tokens=False):
        parts += [np.array(encoding.ids, dtype=np.uint16), end]
    return np.concatenate(parts)


def build_model() -> LlamaForCausalLM:
    """Make the untrained model: grouped-query attention and rotary embeddings as in the large ones, 2.2M parameters."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        # No padding id: it would freeze the separator's embedding.
        bos_token_id=END_ID,
        eos_token_id=END_ID,
    )
    model = LlamaForCausalLM(config)
    model.set_attn_implementation(ATTENTION)
    if 2 * model.num_parameters() > MAX_FILE_BYTES:
        raise ValueError(f"{model.num_parameters()} parameters exceed {MAX_FILE_BYTES} bytes in bf16: shrink the model")
    return model


def window_loss(model: LlamaForCausalLM, tokens: torch.Tensor, starts: torch.Tensor, length: int) -> torch.Tensor:
    """Mean next-token loss over the windows of ``length`` predictions that begin at ``starts``."""
    windows = tokens[starts[:, None] + torch.arange(length + 1, device=tokens.device)]
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


def make_optimizer(model: LlamaForCausalLM, learning_rate: float) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves the norms' gains alone."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)


def take_step(
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    loss_of: WindowLoss,
    tokens: torch.Tensor,
    starts: torch.Tensor,
    length: int,
) -> torch.Tensor:
    """One optimizer step; queues work on the device and waits for none of it."""
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
        loss = loss_of(model, tokens, starts, length)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a clock read after it counts finished work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_per_step(
    model: LlamaForCausalLM, loss_of: WindowLoss, tokens: torch.Tensor, shape: BatchShape, probe_steps: int
) -> float:
    """Compile and time steps of one shape at learning rate zero, which leaves the weights as they are."""
    optimizer = make_optimizer(model, learning_rate=0.0)
    starts = torch.arange(shape.windows, device=tokens.device)
    for _ in range(PROBE_WARMUP_STEPS if probe_steps else 1):
        take_step(model, optimizer, loss_of, tokens, starts, shape.length)
    synchronize(tokens.device)
    started = time.perf_counter()
    for _ in range(probe_steps):
        take_step(model, optimizer, loss_of, tokens, starts, shape.length)
    synchronize(tokens.device)
    return (time.perf_counter() - started) / max(probe_steps, 1)


def plan(
    model: LlamaForCausalLM, tokens: torch.Tensor, shapes: list[BatchShape], steps: int | None, deadline: float
) -> tuple[WindowLoss, int, bool]:
    """Decide before the first real step how to compute the loss, and how many steps fit before the deadline.

    Both shapes are run here, so that neither's compilation falls into the training, and the schedule of the learning
    rate knows its end from its beginning. Returns the loss function, the steps, and whether the function is compiled.
    """
    probe_steps = 0 if steps else PROBE_STEPS
    loss_of: WindowLoss = torch.compile(window_loss, dynamic=False)
    try:
        seconds = [seconds_per_step(model, loss_of, tokens, shape, probe_steps) for shape in shapes]
        compiled = True
    except Exception as error:
        print(f"torch.compile failed, continuing without it: {type(error).__name__}: {error}", flush=True)
        model.zero_grad(set_to_none=True)
        loss_of, compiled = window_loss, False
        seconds = [seconds_per_step(model, loss_of, tokens, shape, probe_steps) for shape in shapes]
    if steps:
        return loss_of, steps, compiled
    short, long = seconds
    mean_seconds = (1 - LONG_SHARE) * short + LONG_SHARE * long
    steps = int(PROBE_MARGIN * (deadline - time.perf_counter()) / mean_seconds)
    print(f"{1e3 * short:.1f} and {1e3 * long:.1f} ms per short and long step: {steps} steps", flush=True)
    if steps < WARMUP_STEPS:
        raise ValueError(f"only {steps} steps fit into the time: give more --minutes, or --steps")
    return loss_of, steps, compiled


def learning_rate(step: int, steps: int) -> float:
    """Warm up, hold, then fall linearly to zero at the last step."""
    warmup = min(WARMUP_STEPS, max(steps // 10, 1))
    return PEAK_LEARNING_RATE * min((step + 1) / warmup, 1.0, (steps - step) / (DECAY_SHARE * steps))


def train(
    model: LlamaForCausalLM,
    loss_of: WindowLoss,
    tokens: torch.Tensor,
    shapes: list[BatchShape],
    steps: int,
    seed: int,
) -> int:
    """Train on random windows and return the number of tokens seen.

    Everything random is drawn on the host beforehand: the same windows on every device, and no copy inside the loop.
    The host waits for the device only to print.
    """
    short, long = shapes
    optimizer = make_optimizer(model, PEAK_LEARNING_RATE)
    generator = torch.Generator().manual_seed(seed)
    places = torch.rand(steps, short.windows, generator=generator, dtype=torch.float64).to(tokens.device)
    losses = torch.zeros(steps, device=tokens.device)
    first_long = round((1 - LONG_SHARE) * steps)
    seen = 0
    started = time.perf_counter()
    model.train()
    for step in range(steps):
        shape = short if step < first_long else long
        starts = (places[step, : shape.windows] * (len(tokens) - shape.length)).long()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        losses[step] = take_step(model, optimizer, loss_of, tokens, starts, shape.length)
        seen += shape.windows * shape.length
        if (step + 1) % PROGRESS_STEPS == 0 or step + 1 == steps:
            recent = losses[max(step + 1 - PROGRESS_STEPS, 0) : step + 1].mean().item()
            elapsed = time.perf_counter() - started
            print(
                f"step {step + 1}/{steps}  loss {recent:.4f}  rate {learning_rate(step, steps):.1e}  "
                f"{seen / elapsed / 1e6:.2f}M tokens/s  {elapsed:.0f} s",
                flush=True,
            )
            if not math.isfinite(recent):
                raise ArithmeticError(f"the loss is {recent} at step {step + 1}")
    return seen


def save_model(model: LlamaForCausalLM, out: Path) -> None:
    """Write the weights in bf16, and refuse a file too large to ship."""
    model.generation_config.pad_token_id = END_ID
    model.to(torch.bfloat16).save_pretrained(out)
    num_bytes = (out / "model.safetensors").stat().st_size
    if num_bytes > MAX_FILE_BYTES:
        raise ValueError(f"model.safetensors has {num_bytes} bytes, more than {MAX_FILE_BYTES}")


@torch.inference_mode()
def position_losses(model: LlamaForCausalLM, tokens: torch.Tensor, starts: torch.Tensor, length: int) -> torch.Tensor:
    """Loss in nats of every prediction, as one row per window."""
    rows = []
    for some in starts.split(EVALUATION_WINDOWS):
        windows = tokens[some[:, None] + torch.arange(length + 1, device=tokens.device)]
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits.float()
        rows.append(F.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none"))
    return torch.cat(rows).double().cpu()


def evaluate(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    training: torch.Tensor,
    heldout: dict[str, torch.Tensor],
    length: int,
) -> dict[str, Any]:
    """Score every whole window of the held-out streams, and as many evenly spaced ones of the training text."""
    # A byte-level token's text has one character per byte. The separator stands for no text: it costs nats, no bytes.
    num_bytes = torch.zeros(VOCAB_SIZE, dtype=torch.long)
    for token, token_id in tokenizer.get_vocab().items():
        num_bytes[token_id] = 0 if token == END else len(token)
    losses = {}
    scored_bytes = 0
    for kind, tokens in heldout.items():
        starts = torch.arange(0, len(tokens) - length, length, device=tokens.device)
        if not len(starts):
            raise ValueError(f"{len(tokens)} held-out tokens of {kind} do not fill one window of {length}")
        losses[kind] = position_losses(model, tokens, starts, length)
        scored_bytes += int(num_bytes[tokens[1 : len(starts) * length + 1].cpu()].sum())
    together = torch.cat(list(losses.values()))
    starts = torch.linspace(0, len(training) - length - 1, len(together), dtype=torch.float64, device=training.device)
    ranges = [(a, min(b, length)) for a, b in itertools.pairwise(POSITION_EDGES) if a < length]
    return {
        "window_tokens": length,
        "heldout_tokens": together.numel(),
        "heldout_nats_per_token": round(together.mean().item(), 4),
        "heldout_bits_per_byte": round(together.sum().item() / math.log(2) / scored_bytes, 4),
        "heldout_nats_per_token_by_kind": {kind: round(loss.mean().item(), 4) for kind, loss in losses.items()},
        "heldout_nats_per_token_by_position": {
            f"{a}-{b - 1}": round(together[:, a:b].mean().item(), 4) for a, b in ranges
        },
        "training_nats_per_token": round(position_losses(model, training, starts.long(), length).mean().item(), 4),
    }


def excerpt(document: str) -> str:
    """Return the beginning of a document, cut between paragraphs; a PEP's without the header and its mail addresses."""
    body = document.partition("\n\n")[2].strip() if is_pep(document) else document
    head = body.encode()[:EXCERPT_BYTES].decode(errors="ignore")
    return head if head == body else head[: head.rindex("\n\n")].rstrip()


def write_heldout(documents: list[str], out: Path) -> list[str]:
    """Write the demo's prompt, one excerpt of a novel and one of a PEP, and return the documents' titles.

    A few PEPs are under other licences; only one that places itself in the public domain can be shipped without notice.
    """
    novel = max((document for document in documents if not is_pep(document)), key=len)
    free = [document for document in documents if is_pep(document) and "public domain" in document[-1500:].lower()]
    if not free:
        raise ValueError("no held-out PEP says that it is in the public domain")
    chosen = [novel, max(free, key=len)]
    text = DOCUMENT_SEPARATOR.join(excerpt(document) for document in chosen)
    (out / "heldout.txt").write_text(text + "\n", encoding="utf-8", newline="")
    return [title(document) for document in chosen]


def main(
    text: Annotated[Path, typer.Option(help="The text, xz-compressed; a line with one NUL separates documents.")],
    out: Annotated[Path, typer.Option(help="Folder for the model, the tokenizer and the records.")],
    minutes: Annotated[float, typer.Option(help="Time for compiling and training; fixes the number of steps.")] = 6.0,
    steps: Annotated[int | None, typer.Option(min=1, help="Number of steps, in place of --minutes.")] = None,
    batch: Annotated[int, typer.Option(min=2, help="Windows per step.")] = 64,
    window: Annotated[int, typer.Option(min=64, max=MAX_POSITIONS // 2, help="Tokens per window.")] = 2048,
    device: Annotated[str, typer.Option(help="Where to train.")] = "cuda" if torch.cuda.is_available() else "cpu",
    seed: Annotated[int, typer.Option(help="Of the initial weights and the windows.")] = 0,
    max_docs: Annotated[int | None, typer.Option(min=2, help="Documents of each kind, for a smoke test.")] = None,
) -> None:
    """Train the demo model, evaluate it as it ships, and write everything that ships."""
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    place = torch.device(device)

    documents = read_documents(text, max_docs)
    training_documents, heldout_documents = split_documents(documents)
    prompt_titles = write_heldout(heldout_documents, out)
    tokenizer = train_tokenizer(training_documents)
    save_tokenizer(tokenizer, out)

    def stream(some: list[str]) -> torch.Tensor:
        return torch.from_numpy(encode(tokenizer, some).astype(np.int64)).to(place)

    tokens = stream(training_documents)
    heldout = {
        "novels": stream([document for document in heldout_documents if not is_pep(document)]),
        "peps": stream([document for document in heldout_documents if is_pep(document)]),
    }
    print(
        f"{len(tokens)} training and {sum(map(len, heldout.values()))} held-out tokens, "
        f"{time.perf_counter() - started:.0f} s",
        flush=True,
    )

    torch.manual_seed(seed)
    model = build_model().to(place)
    num_parameters = model.num_parameters()
    shapes = [BatchShape(batch, window), BatchShape(batch // 2, 2 * window)]
    training_started = time.perf_counter()
    loss_of, steps, compiled = plan(model, tokens, shapes, steps, training_started + 60 * minutes)
    seen = train(model, loss_of, tokens, shapes, steps, seed)
    training_seconds = time.perf_counter() - training_started
    save_model(model, out)

    shipped = AutoModelForCausalLM.from_pretrained(out, attn_implementation=ATTENTION).to(place).eval()
    evaluation = evaluate(shipped, tokenizer, tokens, heldout, 2 * window)
    record = {
        "parameters": num_parameters,
        "data": {
            "description": DATA_DESCRIPTION,
            "file": text.name,
            "sha256": hashlib.sha256(text.read_bytes()).hexdigest(),
            "documents": len(documents),
            "heldout_documents": [title(document) for document in heldout_documents],
            "heldout_txt": prompt_titles,
        },
        "training_tokens": len(tokens),
        "tokens_seen": seen,
        "epochs": round(seen / len(tokens), 2),
        "steps": steps,
        "batch": batch,
        "window": window,
        "seed": seed,
        "peak_learning_rate": PEAK_LEARNING_RATE,
        "evaluation": evaluation,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else place.type,
        "compiled": compiled,
        "training_seconds": round(training_seconds, 1),
        "wall_seconds": round(time.perf_counter() - started, 1),
    }
    write_json(out / "training.json", record)
    print(json.dumps(evaluation, indent=2), flush=True)
    for path in sorted(out.iterdir()):
        print(f"{path.stat().st_size:>9} {path.name}")


if __name__ == "__main__":
    typer.run(main)
