"""Score a GPT-2 on the zero-shot tasks of the paper, with the LM Evaluation Harness (pip install 'slope_pl[eval]').

    python -m recipes.gpt2.zeroshot --ckpt CHECKPOINT --tasks piqa race lambada
    python -m recipes.gpt2.zeroshot --ckpt CHECKPOINT --data FOLDER --tokenizer FOLDER --output results.json

CHECKPOINT is what this recipe wrote under any strategy, dense or sparse, or a Hugging Face folder or hub id. Without
--data the tasks come from the hub; with it, from local files, under the same prompts and metrics.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from recipes.gpt2 import zeroshot_tasks
from recipes.gpt2.module import TOKENIZER_KEY, GPT2Pretraining
from recipes.gpt2.zeroshot_report import PUBLISHED, PUBLISHED_METRIC, PUBLISHED_MODEL, RACE_NOTE, Score, collect, table
from slope_pl import CheckpointError, ConfigError, SLoPeError, sparse_layers
from slope_pl.checkpoint import is_checkpoint, load_module, read_checkpoint
from slope_pl.data import DataUnavailableError, TextTokenizer, load_bpe
from slope_pl.models import GPT2, load_gpt2, load_gpt2_config

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_KINDS = "a checkpoint of recipes.gpt2 (.ckpt), or a Hugging Face folder or hub id of a GPT-2"


def load_model(ckpt: str) -> tuple[GPT2, dict[str, str]]:
    """Load the model to score, on the CPU.

    Args:
        ckpt: a checkpoint of this recipe, dense or sparse, of any strategy; or a folder with config.json and
            model.safetensors, or a hub id.

    Returns:
        The model, and the tokenizer that the checkpoint names as arguments of :func:`slope_pl.data.load_bpe`; empty if none.

    Raises:
        CheckpointError: if it is something else; says what.
        OSError: if there is no such file or folder, or the hub does not deliver.
    """
    path = Path(ckpt).expanduser()
    if is_checkpoint(path):
        return _from_checkpoint(path)
    if path.suffix == ".ckpt" and not path.exists():
        raise CheckpointError(f"no file {path} (working directory: {Path.cwd()}). Expected {_KINDS}.")
    try:
        net = GPT2(load_gpt2_config(ckpt))
        load_gpt2(net, ckpt)
    except ValueError as error:
        raise CheckpointError(f"{ckpt} is not a GPT-2 that can be scored: {error} Expected {_KINDS}.") from error
    return net, {}


def _from_checkpoint(path: Path) -> tuple[GPT2, dict[str, str]]:
    expected = f"Expected {_KINDS}."
    if path.suffix in (".safetensors", ".bin"):
        expected = f"Give its folder: {path.parent}."
    try:
        content = read_checkpoint(path, optimizer=False)
    except CheckpointError as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint. {expected} ({error})") from error
    state = content["state_dict"]
    if "net.wte.weight" not in state:
        found = f"its tensors are {', '.join(list(state)[:3])}, ..."
        raise CheckpointError(f"{path} is not of a GPT-2 of this recipe: {found}. {expected}")
    module = load_module(GPT2Pretraining, path)
    assert module.net is not None, "load_from_checkpoint builds it"
    return module.net, content.get(TOKENIZER_KEY) or {}


def load_tokenizer(given: str | None, named: dict[str, str], ckpt: str) -> TextTokenizer:
    """The tokenizer asked for, else the checkpoint's own, else that of its folder, else GPT-2's from the hub.

    Raises:
        DataUnavailableError: if it is not there.
        ConfigError: if it is not a byte-level BPE.
    """
    folder = Path(ckpt).expanduser()
    own = folder.is_dir() and any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    arguments = {"source": given} if given is not None else named or {"source": ckpt if own else "gpt2"}
    try:
        return load_bpe(**arguments)
    except DataUnavailableError as error:
        raise DataUnavailableError(f"{error} (--tokenizer says where it is.)") from error
    except ValueError as error:
        raise ConfigError(f"not a tokenizer to score with: {error}. Name another one with --tokenizer.") from error


def evaluate(
    net: GPT2,
    tokenizer: TextTokenizer,
    tasks: list[str],
    data: str | Path | None = None,
    limit: int | None = None,
    shots: int = 0,
    batch_size: int = 16,
    device: str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[list[Score], dict[str, Any]]:
    """Score a model; it is moved to ``device`` and ``dtype``.

    Args:
        net: dense or sparse.
        tokenizer: of the text it was trained on.
        tasks: keys of ``zeroshot_tasks.TASKS``.
        data: folder of local task files; None for the hub.
        limit: first documents of each task, or of each subject of MMLU; None for all.
        shots: worked examples before each question.
        batch_size: rows a forward pass.
        device: None leaves the model where it is.
        dtype: of the weights; None leaves them as they are.

    Returns:
        The scores, and the harness' own results.

    Raises:
        ConfigError: for an unknown task, a tokenizer that does not belong to the model, a setting out of range.
        DataUnavailableError: if a file is missing, or the hub does not deliver.
        ModuleNotFoundError: if lm_eval is not installed.
    """
    zeroshot_tasks.check_names(tasks)
    for name, value, lowest in (("limit", limit, 1), ("shots", shots, 0)):
        if value is not None and value < lowest:
            raise ConfigError(f"{name}={value}, expected at least {lowest}.")
    folder = None if data is None else Path(data).expanduser()
    if folder is not None:
        for name in tasks:  # before seconds go into imports
            zeroshot_tasks.find_file(name, folder)
    _require_harness()
    # Imported here: it takes seconds, and the extra may be absent.
    from recipes.gpt2.zeroshot_harness import load_tasks, score
    from slope_pl.evaluation.harness import GPT2LM

    lm = GPT2LM(net, tokenizer, batch_size=batch_size, device=device, dtype=dtype)
    results = score(lm, load_tasks(tasks, folder, shots), limit)
    return collect(results, tasks), results


def _require_harness() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise ModuleNotFoundError(
            "the LM Evaluation Harness (lm_eval) is not installed: pip install 'slope_pl[eval]', or pip install lm-eval."
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        _run(options)
    except (SLoPeError, OSError, ModuleNotFoundError) as error:
        print(f"zeroshot: {error}", file=sys.stderr)
        return 2
    return 0


def _run(options: argparse.Namespace) -> None:
    zeroshot_tasks.check_names(options.tasks)
    _require_harness()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"--device {device}: torch sees no GPU here; use --device cpu.")
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
    net, named = load_model(options.ckpt)
    tokenizer = load_tokenizer(options.tokenizer, named, options.ckpt)
    sparse = len(sparse_layers(net))
    kind = f"2:4 sparse in {sparse} layers" if sparse else "dense"
    print(
        f"{options.ckpt}: GPT-2 of {net.config.n_layer} layers of {net.config.n_embd}, {kind}; {device}, {options.dtype}"
    )
    batch_size = (64 if device.startswith("cuda") else 16) if options.batch_size is None else options.batch_size
    settings = {"limit": options.limit, "shots": options.shots, "batch_size": batch_size}
    scores, results = evaluate(
        net, tokenizer, options.tasks, options.data, device=device, dtype=_DTYPES[options.dtype], **settings
    )
    print(table(scores, options.limit))
    if options.output is None:
        return
    content = {
        "checkpoint": options.ckpt,
        "model": net.config.to_dict() | {"sparse_layers": sparse},
        "settings": settings | {"device": device, "dtype": options.dtype, "data": options.data or "hub"},
        "versions": {name: importlib.metadata.version(name) for name in ("lm_eval", "torch")},
        "scores": [asdict(score) for score in scores],
        "task_versions": results["versions"],
        "published": {"model": PUBLISHED_MODEL, "metric": f"{PUBLISHED_METRIC} (inferred)", "per_cent": PUBLISHED},
        "notes": [RACE_NOTE] if "race" in options.tasks else [],
    }
    options.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"Results: {options.output}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.gpt2.zeroshot",
        description=f"{__doc__}\n{zeroshot_tasks.__doc__}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--ckpt", required=True, help=_KINDS)
    parser.add_argument("--tasks", nargs="+", default=list(zeroshot_tasks.TASKS), help="default: %(default)s")
    parser.add_argument("--data", help="folder of local task files (layout above); default: the hub")
    parser.add_argument(
        "--tokenizer", help="folder or hub id; default: the checkpoint's own, else the folder's, else gpt2 from the hub"
    )
    parser.add_argument("--limit", type=int, help="first documents of each task, or of each subject of MMLU")
    parser.add_argument("--shots", type=int, default=0, help="worked examples before each question; default: 0")
    parser.add_argument("--batch_size", type=int, help="rows a forward pass; default: 64 on a GPU, 16 on the CPU")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: a GPU if there is one")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="of weights; default: %(default)s")
    parser.add_argument("--output", type=Path, help="JSON file for scores, settings and versions")
    return parser


if __name__ == "__main__":
    sys.exit(main())
