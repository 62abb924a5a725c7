"""The command line of every recipe: Lightning's, over base configs, with checkpoints that say what they replace."""

import inspect
import json
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from recipes import resuming
from recipes.checkpoints import refuse_foreign
from recipes.launching import without_resume
from recipes.results import RunTable
from slope_pl import CheckpointError, ConfigError
from slope_pl.checkpoint import load_module, saved_settings
from slope_pl.checkpoint.whole import damage
from slope_pl.lightning import StopOnSignal

Own = dict[str, Callable[[list[str]], None]]
_ALWAYS = (
    "Any value can be overridden. The settings of the sparse method: fit --model.slope.help. A checkpoint as a dense Hugging "
    "Face folder: export --help."
)


class RecipeCLI(LightningCLI):
    """Lightning's command line, for modules with ``restores_checkpoint``.

    Attributes:
        stages: Lightning's subcommands that mean something in the recipe.
        silent: settings of the model that a checkpoint may replace without a word.
        advice: what to do about a checkpoint of another kind.
    """

    stages: ClassVar[tuple[str, ...]] = ("fit", "validate")
    silent: ClassVar[tuple[str, ...]] = ("weights", "bert")
    advice: ClassVar[str]

    @classmethod
    def subcommands(cls) -> dict[str, set[str]]:
        """Those of ``stages``."""
        return {name: LightningCLI.subcommands()[name] for name in cls.stages}

    @staticmethod
    def kind(settings: dict[str, Any]) -> str:
        """What a model with these settings is called."""
        return "dense" if settings.get("slope") is None else "2:4 sparse"

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """``fit`` can resume by itself."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "fit":
            parser.add_argument(
                "--resume",
                type=str | None,
                default=None,
                help="auto: go on from this run's newest whole checkpoint, or begin where there is none; so the same command "
                "can be started again and again. See recipes/resuming.py for what is the same run.",
            )
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Choose the checkpoint, and look whether it is whole, before anything is read from it."""
        super().parse_arguments(parser, args)
        name = self.config.get("subcommand")
        section = self.config.get(name or "", {})
        resume, path = section.get("resume"), section.get("ckpt_path")
        if resume not in (None, "auto"):
            raise ConfigError(
                f"--resume {resume}: auto is all that it takes; name a checkpoint with --ckpt_path {resume}"
            )
        if resume and path:
            raise ConfigError(
                f"--resume auto and --ckpt_path {path} contradict each other: one looks for a checkpoint, the other names it. "
                "Leave one of them out"
            )
        if resume and section.trainer.enable_checkpointing is False:
            raise ConfigError(
                "--resume auto and --trainer.enable_checkpointing false contradict each other: a run that saves nothing leaves "
                "nothing to go on from. Leave one of them out, or name a checkpoint to go on from with --ckpt_path"
            )
        if resume:
            self._resume(name, args is None)
        elif path and Path(path).exists() and (reason := damage(Path(path))) is not None:
            raise CheckpointError(
                f"{path} is damaged: {reason}. Name another checkpoint; fit --resume auto finds the newest that is whole"
            )

    def _resume(self, name: str, from_process: bool) -> None:
        section = self.config[name]
        settings = json.loads(self._parser(name).dump(section, skip_none=False, format="json"))
        choice = resuming.decided_by_rank_zero(
            lambda: resuming.choose(settings["trainer"], settings), settings["trainer"]["num_nodes"]
        )
        _say(choice.lines)
        section.resume, section.ckpt_path = None, choice.checkpoint
        chosen = [] if choice.checkpoint is None else ["--ckpt_path", choice.checkpoint]
        if choice.checkpoint is not None:
            # config.yaml stays as it is: it says which run this is.
            self.save_config_kwargs["config_filename"] = resuming.RESUMED_CONFIG
        if choice.version is not None:
            section.trainer.logger.init_args.version = choice.version
            chosen += ["--trainer.logger.init_args.version", choice.version]
        if from_process:
            sys.argv[1:] = [*without_resume(sys.argv[1:]), *chosen]  # processes that this one starts begin with these

    def instantiate_classes(self) -> None:
        """A setting that its class refuses is that class's own error, and not a list of all types that were tried."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            if (reason := _own_error(error)) is None:
                raise
            raise reason from None

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Without the callbacks of a config that were switched off: Lightning would refuse to have both.

        From here on a signal before training says that nothing is saved: data are prepared before callbacks are asked.
        """
        settings = dict(self._get(self.config_init, "trainer", default={})) | kwargs
        trainer = super().instantiate_trainer(**kwargs | {"callbacks": _switched_on(settings)})
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if self.subcommand == "fit" and isinstance(callback, StopOnSignal):
                callback.watch(trainer)
        return trainer

    def before_fit(self) -> None:
        """A run that continues from a checkpoint does not read other weights first."""
        self.model.restores_checkpoint = self.config[self.subcommand].ckpt_path is not None

    before_validate = before_predict = before_fit

    def after_fit(self) -> None:
        """A run that was killed in its last validation has nothing left to train, and no scores."""
        if any(isinstance(callback, RunTable) and callback.unscored for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
            self.trainer.validate(self.model, datamodule=self.datamodule)

    def _parse_ckpt_path(self) -> None:
        """Take the model's settings from the checkpoint, as Lightning does, but say where they replace the given ones."""
        given = self._model_settings()
        path = self.config.get(self.config.get("subcommand") or "", {}).get("ckpt_path")
        if path and Path(path).exists():
            refuse_foreign(path, given, self.parser.prog)
        if path and Path(path).is_dir():
            self._parse_folder(path)
        else:
            super()._parse_ckpt_path()
        used = self._model_settings()
        if self.kind(given) != self.kind(used):
            raise CheckpointError(
                f"the checkpoint is of a {self.kind(used)} model, the configuration is {self.kind(given)}: {self.advice}"
            )
        for key in used:
            if key not in self.silent and used[key] != given.get(key):
                print(f"From the checkpoint: model.{key} = {used[key]} (not {given.get(key)})", file=sys.stderr)

    def _parse_folder(self, path: str) -> None:
        """The same for what FSDP2 and DeepSpeed leave: Lightning takes settings from files alone."""
        section = self.config[self.config["subcommand"]]
        with tempfile.TemporaryDirectory() as folder:
            section.ckpt_path = f"{folder}/settings.ckpt"
            torch.save({"hyper_parameters": saved_settings(path)}, section.ckpt_path)
            super()._parse_ckpt_path()
        self.config[self.config["subcommand"]].ckpt_path = path

    def _model_settings(self) -> dict[str, Any]:
        section = self.config.get(self.config.get("subcommand") or "", {})
        return dict(section["model"].as_dict()) if "model" in section else {}


def _own_error(error: BaseException | None) -> Exception | None:
    """The error of this project that is behind one of the command line's parser; None if there is none."""
    while (error := error and (error.__cause__ or error.__context__)) is not None:
        frames = list(traceback.walk_tb(error.__traceback__))
        module = frames[-1][0].f_globals.get("__name__", "") if frames else ""
        if module.startswith(("slope_pl.", "recipes.")) and isinstance(error, Exception):
            return error
    return None


def _switched_on(settings: dict[str, Any]) -> list[pl.Callback]:
    """The callbacks that the Trainer's ``enable_progress_bar`` and ``enable_checkpointing`` leave; a signal obeys them, too."""
    found = settings.get("callbacks") or []
    callbacks: list[pl.Callback] = list(found) if isinstance(found, list) else [found]
    if settings.get("enable_progress_bar") is False:
        callbacks = [callback for callback in callbacks if not isinstance(callback, ProgressBar)]
    if settings.get("enable_checkpointing") is False:
        callbacks = [callback for callback in callbacks if not isinstance(callback, Checkpoint)]
        for callback in callbacks:
            if isinstance(callback, StopOnSignal):
                callback.saves = False
    return callbacks


@rank_zero_only
def _say(lines: list[str]) -> None:
    print("\n".join(lines), file=sys.stderr, flush=True)


def run_recipe(
    cli: type[RecipeCLI],
    module: type[pl.LightningModule],
    data: type[pl.LightningDataModule],
    base: Path,
    prog: str,
    description: str,
    arguments: list[str] | None,
    own: Own,
    lay: bool = False,
) -> RecipeCLI | None:
    """Run a subcommand.

    Args:
        cli: the recipe's.
        module: the model's class.
        data: the data module's.
        base: the config that every other is laid over.
        prog: how the recipe is called, ``python -m recipes...``.
        description: what the recipe does, and what its configs lie over; for ``--help``.
        arguments: None for those of the process.
        own: subcommands beside Lightning's, each called with the arguments after its name.
        lay: whether a config also lies over those whose names it continues, see :func:`lay_over`.

    Returns:
        Lightning's command line, finished; None after a subcommand of the recipe's own.
    """
    given = sys.argv[1:] if arguments is None else arguments
    if given and given[0] in own:
        own[given[0]](given[1:])
        return None
    if lay:
        laid = lay_over(given)
        if arguments is None:
            sys.argv[1:] = (
                laid  # and not args=, which Lightning warns of; processes that it starts begin with these, too
            )
        else:
            arguments = laid
    # Without allow_abbrev=False the misspelt --trainer.max_step would be taken for --trainer.max_steps.
    options: dict[str, Any] = {"allow_abbrev": False, "prog": prog, "description": f"{description} {_ALWAYS}"}
    options |= {name: {"default_config_files": [str(base)]} for name in cli.subcommands()}
    return cli(
        module,
        data,
        args=arguments,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        auto_configure_optimizers=False,
        parser_kwargs=options,
    )


def checkpoint_parser(prog: str, description: str | None) -> ArgumentParser:
    """A parser of a subcommand that takes a checkpoint."""
    parser = ArgumentParser(prog=prog, description=description)
    parser.add_argument("--ckpt_path", type=str, required=True, help="a checkpoint of this recipe, of any strategy")
    return parser


def exporter(
    module: type[Any], prog: str, beside: Callable[[str, str], None] | None = None
) -> Callable[[list[str]], None]:
    """The subcommand ``export`` of a recipe whose module has ``export(folder)``.

    Args:
        module: its class.
        prog: the recipe, as it is run.
        beside: adds further files; gets the checkpoint and the folder.
    """

    def export(arguments: list[str]) -> None:
        parser = checkpoint_parser(f"{prog} export", "Write a checkpoint as a dense Hugging Face model.")
        parser.add_argument(
            "--folder", type=str, required=True, help="where config.json and model.safetensors go; one without a model"
        )
        options = parser.parse_args(arguments)
        folder = str(Path(options.folder).expanduser())
        _refuse_a_models_folder(Path(folder))
        refuse_foreign(options.ckpt_path, inspect.signature(module.__init__).parameters, prog)
        load_module(module, options.ckpt_path).export(folder)
        if beside is not None:
            beside(options.ckpt_path, folder)
        print(f"Dense Hugging Face model: {folder}")

    return export


def _refuse_a_models_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--folder {folder} is a file; name a folder, which may be a new one")
    there = [path.name for kind in ("config.json", "*.safetensors*", "*.bin*") for path in sorted(folder.glob(kind))]
    if there:
        raise ConfigError(
            f"--folder {folder} holds a model already ({', '.join(there[:3])}), which the export would write over; name "
            "another folder, or remove it first"
        )


def lay_over(arguments: list[str]) -> list[str]:
    """Put ``--config novels.yaml`` before ``--config novels_slope.yaml``, where that file is.

    A config is laid over every file beside it whose name it continues after an underscore, the shortest lowest.
    """
    laid: list[str] = []
    after_flag = False
    for argument in arguments:
        flag, _, joined = argument.partition("=")
        given = argument if after_flag else joined if flag in ("--config", "-c") else ""
        for under in _under(Path(given)) if given else []:
            if str(under) not in laid:
                at = len(laid) - after_flag
                laid[at:at] = ["--config", str(under)]
        laid.append(argument)
        after_flag = argument in ("--config", "-c")
    return laid


def _under(config: Path) -> list[Path]:
    parts = config.stem.split("_")
    shorter = [config.with_name("_".join(parts[:n]) + config.suffix) for n in range(1, len(parts))]
    return [path for path in shorter if path.is_file()]
