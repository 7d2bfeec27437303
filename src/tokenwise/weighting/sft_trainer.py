"""TRL's SFTTrainer: what of it the weighted loss cannot work with, and columns through its preparation of data."""

from __future__ import annotations

import copy
from typing import Any

from transformers import Trainer

from tokenwise.errors import Problem
from tokenwise.weighting.base import Normalize, TokenWeighter
from tokenwise.weighting.columns import check_columns, column_names
from tokenwise.weighting.forward import COLUMNS, owns_denominator


def is_sft_trainer(trainer: Trainer) -> bool:
    """Whether `trainer` is TRL's SFTTrainer or a subclass of it."""
    return any(
        base.__module__ == "trl.trainer.sft_trainer" and base.__name__ == "SFTTrainer" for base in type(trainer).__mro__
    )


def sft_trainer_problems(trainer: Any, method: TokenWeighter, normalize: Normalize) -> list[Problem]:
    """The settings of an SFTTrainer under which the weighted loss would be wrong."""
    import trl.trainer.utils

    args, name = trainer.args, type(method).__name__
    reads = method.reads & set(COLUMNS)
    found = []
    if not hasattr(trl.trainer.utils, "FusedCausalLMOutput"):
        found.append(Problem("trl", f"is version {trl.__version__}, too old.", "Install trl 1.16 or newer."))
    if args.loss_type != "nll":
        found.append(
            Problem(
                "args.loss_type",
                f"{args.loss_type!r} weighs the tokens once more, on top of {name}.",
                "Set it to 'nll' (tokenwise.DFT is the same loss).",
            )
        )
    if trainer.aux_loss_enabled and owns_denominator(method, normalize):
        found.append(
            Problem(
                "args.router_aux_loss_coef",
                f"adds a router loss, whose gradients the correction of {name}'s denominator would rescale too.",
                "Set it to 0.0, or use a method that divides by the number of labels.",
            )
        )
    parallelism = trainer.accelerator.parallelism_config
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        found.append(
            Problem("args.parallelism_config", "splits sequences over processes.", "Use data parallelism alone.")
        )
    adapter = getattr(trainer.model, "active_peft_config", None)
    if reads and adapter is not None and adapter.is_prompt_learning:
        found.append(
            Problem(
                "peft_config",
                f"puts virtual tokens before each sequence, with which the columns {name} reads do not align.",
                "Use another adapter, such as LoRA.",
            )
        )
    if reads and trainer._is_vision_dataset:
        found.append(
            Problem(
                "train_dataset",
                f"holds images, whose tokens are made batch by batch; columns that {name} reads cannot align.",
                "Use a method that reads no columns.",
            )
        )
    if args.packing:
        wants = _boundaries(method)
        if args.packing_strategy == "wrapped" and wants is not None:
            found.append(
                Problem(
                    "args.packing_strategy",
                    f"'wrapped' leaves no mark where a sample ends, which {name} needs ({wants}).",
                    "Use 'bfd'.",
                )
            )
        present = column_names(trainer.train_dataset) or []
        if reads and not isinstance(trainer, WeighMixin):
            found.append(
                Problem(
                    "args.packing",
                    f"drops the columns that {name} reads.",
                    "Make the trainer of a class T(tokenwise.WeighMixin, SFTTrainer).",
                )
            )
        elif "sample_id" in reads and "sample_id" not in present and args.packing_strategy == "bfd_split":
            found.append(
                Problem(
                    "train_dataset.sample_id",
                    "is missing, and samples that 'bfd_split' cut apart cannot be numbered afterwards.",
                    "Give each row a number sample_id.",
                )
            )
    return found


def _boundaries(method: TokenWeighter) -> str | None:
    """What of a method needs to know where a sample ends; None where nothing does."""
    if getattr(method, "scope", None) == "sequence":
        return "scope: sequence"
    if method.compares_sequences:
        return "its weights differ from sequence to sequence"
    if method.reduction == "sequence_mean":
        return "mean per sequence"
    if "sample_id" in method.reads:
        return "it reads sample_id"
    return None


class WeighMixin:
    """Carries token-aligned columns through SFTTrainer's preparation of the training data.

    ``class T(tw.WeighMixin, SFTTrainer): pass`` is an SFTTrainer whose truncation and packing cut the columns
    ``loss_weights``, ``reference_nll`` and ``sample_id`` of the training data at the same places as the tokens; give
    it to `weigh` as usual. A row's columns are lists as long as its tokens before truncation; ``sample_id`` may be one
    number for the row. Where nothing is truncated or packed, a plain SFTTrainer does as well.

    Raises:
        InputError: when a column is shorter or longer than its row's tokens, or holds no number.
    """

    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Any:
        from trl.data_utils import get_dataset_column_names, pack_dataset

        prepare = super()._prepare_dataset  # type: ignore[misc]
        names = [name for name in COLUMNS if name in get_dataset_column_names(dataset)]
        if dataset_name != "train" or not names:
            return prepare(dataset, processing_class, args, packing, formatting_func, dataset_name)

        # First only the tokens and labels of the whole rows, for the columns are as long as these.
        whole = copy.copy(args)
        whole.max_length, whole.shuffle_dataset = None, False
        dataset = prepare(dataset, processing_class, whole, False, formatting_func, dataset_name)
        # SFTTrainer makes labels of masks, and drops these.
        names = [name for name in names if name in get_dataset_column_names(dataset)]
        check_columns(dataset, names, negative=True, first_is_read=packing and args.packing_strategy == "wrapped")
        options = {"num_proc": args.dataset_num_proc} if hasattr(dataset, "num_rows") else {}

        if not packing or args.max_length is None:
            dataset = prepare(dataset, processing_class, args, packing, None, dataset_name)
            if args.max_length is None:
                return dataset
            kept = (
                slice(None, args.max_length) if args.truncation_mode == "keep_start" else slice(-args.max_length, None)
            )
            return dataset.map(_cut, fn_kwargs={"names": names, "kept": kept}, **options)

        dataset = dataset.map(_broadcast, **options) if "sample_id" in names else dataset
        dataset = dataset.select_columns(["input_ids", "labels", *names])
        # The order of SFTTrainer's own packing, so that the batches are the same as without columns.
        dataset = dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset
        dataset = pack_dataset(dataset, args.max_length, args.packing_strategy, options)
        return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset


def _cut(row: dict[str, Any], names: list[str], kept: slice) -> dict[str, Any]:
    return {name: row[name][kept] for name in names if isinstance(row[name], list)}


def _broadcast(row: dict[str, Any]) -> dict[str, Any]:
    number = row["sample_id"]
    return {"sample_id": number if isinstance(number, list) else [number] * len(row["input_ids"])}
