"""The job: one schema for the YAML file, the command line and Python.

Values that depend on the cluster (world size, accumulation) are in `plan.Plan` instead.
A description names the unit first. Unknown keys are errors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, model_validator

from raydist.job.check import Places, require_valid
from raydist.job.deepspeed import deepspeed_config
from raydist.job.section import Count, Section, Width
from raydist.job.text import parse_json
from raydist.job.tune import Tune
from raydist.limits import read_limited

Share = Annotated[float, Field(ge=0, lt=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainTokenizer(Section):
    vocab_size: Annotated[int, Field(ge=300, le=2**24)] = Field(
        description="entries of the byte-level BPE vocabulary"
    )


class NewTokenizer(Section):
    train: TrainTokenizer


def _different(given: list[str] | str) -> list[str] | str:
    tokens = [given] if isinstance(given, str) else given
    if "" in tokens or len(set(tokens)) < len(tokens):
        raise ValueError("a new token is a text, and occurs once")
    return given


class Model(Section):
    base: str | None = Field(None, description="hub id or folder of the pretrained model to start from")
    config: dict[str, Any] | None = Field(
        None, description="transformers configuration of a model with random weights; needs model_type"
    )
    tokenizer: str | NewTokenizer | None = Field(
        None, description="hub id, folder, or {train: {vocab_size: N}}; default: the base's"
    )
    add_tokens: Annotated[list[str] | str, AfterValidator(_different)] | None = Field(
        None,
        description="new tokens for a base: a list of them; or hub id or folder of a tokenizer that has them"
        " behind the base's own. Their rows in embedding and head begin as the mean of the others",
    )
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto",
        description="auto: the fastest that keeps documents apart; any other is used as given, or refused",
    )


Format = Literal["auto", "parquet", "jsonl", "json", "csv", "text", "arrow"]
"""The names in raydist.corpus.formats.table.READERS, which job/ cannot import; a test compares the two."""

Encoding = Literal[
    "utf-8", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be", "latin-1", "cp1252",
    "cp1251", "koi8-r", "gb18030", "big5", "shift_jis", "euc-jp", "euc-kr",
]  # fmt: skip
"""Python's names of them."""


class Source(Section):
    path: str | list[str] = Field(
        description="file, folder, glob or URI (s3://..., hf://datasets/OWNER/NAME), or a list of them"
    )
    format: Format = Field("auto", description="auto: by each file's name")
    text_column: str = Field("text", description="column of the text; dots enter nested columns")
    document: Literal["line", "paragraph", "file"] = Field(
        "line", description="what one document is in a plain text file"
    )
    encoding: Encoding = Field(
        "utf-8",
        description="how text, CSV and JSON are encoded; a file that is not in UTF-8 is read in one task",
    )
    exclude: list[str] = Field(
        default_factory=list, description="globs of files to leave out, relative to path"
    )
    records: str | None = Field(
        None,
        description="of a .json file that is one object: the path, with dots, of the list of its records;"
        " null: the object is one record",
    )
    delimiter: Annotated[str, Field(pattern=r"^[\t -~]$")] | None = Field(
        None,
        description="between the fields of CSV; null: a comma (in .tsv a tab), or else the first of , ; tab"
        " and | with which the header has the text column",
    )
    quote: Annotated[str, Field(pattern=r"^([!-~]|none)$")] | None = Field(
        None, description='around fields of CSV that hold delimiters; null: "; none: no quotes'
    )
    split: str = Field(
        "train",
        description="of a folder that holds a data set with splits: the one to read; all: every one",
    )

    replay: bool = Field(
        False,
        description="text like that on which the base was trained: what the model forgets of it is measured"
        " before and after. A source to train on, if none has a weight, gets 0.05 of the samples",
    )


class TrainSource(Source):
    weight: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="share of the samples; give every source one, or none"
    )


REPLAY_SHARE = 0.05
"""Of the samples, for sources with `replay` and no weight: what Ibrahim et al. (Simple and Scalable
Strategies to Continually Pre-train Large Language Models, 2024, arXiv:2403.08763) found enough where the new
text is in the base's language; for another language they take 0.25."""


class Corpus(Section):
    sources: dict[str, TrainSource] = Field(
        min_length=1, description="text to train on; each source has a name of your own"
    )
    holdout: Share = Field(0.005, description="share of documents kept out of training, chosen by hash")
    clean: list[str | dict[str, Any]] = Field(
        default_factory=list,
        description="cleaning steps in order: a name, {name: options} or module:function",
    )
    dedup: Literal["none", "exact"] = Field(
        "none",
        description="exact: train only on the first of the documents with equal text, over all sources",
    )
    on_error: Literal["fail", "quarantine"] = Field(
        "fail", description="unreadable records: refuse to train, or list them in quarantine.jsonl and go on"
    )
    slice_bytes: Annotated[int, Field(ge=1024, le=2**48)] = Field(
        32 * 2**20, description="bytes of source files that one task turns into a shard"
    )

    @property
    def weights(self) -> dict[str, float | None]:
        """The share of each source, as it is used; None for all where sources are read one after another."""
        given = {name: source.weight for name, source in self.sources.items()}
        replayed = [name for name, source in self.sources.items() if source.replay]
        if not replayed or any(weight is not None for weight in given.values()):
            return given
        others = len(given) - len(replayed)
        return {
            name: REPLAY_SHARE / len(replayed) if name in replayed else (1 - REPLAY_SHARE) / others
            for name in given
        }


class Prepare(Section):
    wait: Literal["auto", "all"] = Field(
        "auto",
        description="training waits for: auto, a first window of shards if CPUs are spare; all, every one",
    )


class Packing(Section):
    block_size: Annotated[int, Field(ge=8, le=2**31)] = Field(1024, description="tokens per sequence")
    strategy: Literal["best_fit", "concat"] = Field(
        "best_fit",
        description="best_fit cuts few documents; concat cuts at every block's end; neither drops a token",
    )
    document_mask: bool = Field(True, description="attention does not cross documents")
    add_eos_token: bool = Field(True, description="end every document with the end-of-sequence token")
    add_bos_token: bool | Literal["auto"] = Field(
        "auto",
        description="begin every document with the beginning-of-sequence token; auto: if the tokenizer itself"
        " puts a token in front of a text, with that one",
    )
    window_shards: Count = Field(16, description="shards whose blocks are shuffled together")


class Optimizer(Section):
    name: Literal["adamw", "adamw_8bit", "adafactor", "muon"] = Field(
        "adamw",
        description="train.optimizer: NAME is short for it; fsdp takes adamw and muon, zero adamw alone",
    )
    betas: tuple[Beta, Beta] | None = Field(
        None,
        description="decay of AdamW's means of the gradient and of its square; null: [0.9, 0.999];"
        " muon: of the AdamW that steps the rest; adafactor has none",
    )
    eps: Annotated[float, Field(gt=0)] | None = Field(
        None, description="added to AdamW's denominator; null: 1e-8; muon, adafactor: as betas"
    )

    @property
    def options(self) -> dict[str, Any]:
        """betas and eps as they are used; {} for an optimizer that has neither."""
        if self.name == "adafactor":
            return {}
        return {"betas": self.betas or (0.9, 0.999), "eps": self.eps or 1e-8}


def _read_optimizer(given: Any) -> Any:
    return {"name": given} if isinstance(given, str) else given


Precision = Annotated[
    Literal["bf16", "fp16", "fp32", "no"], AfterValidator(lambda given: "fp32" if given == "no" else given)
]


def _known_recomputed(given: Any) -> Any:
    if isinstance(given, bool) or given == "selective" or (isinstance(given, int) and 2 <= given <= 2**20):
        return given
    raise ValueError(f"true, false, selective, or n from 2 on for every n-th layer, not {given!r}")


Recomputed = Annotated[bool | int | Literal["selective"], BeforeValidator(_known_recomputed)]


class Extend(Section):
    max_tokens: Annotated[float, Field(gt=0)] = Field(description="tokens more, rounded up to whole steps")
    rewarm: bool = Field(
        True,
        description="the learning rate rises to train.lr and falls again over these steps (Ibrahim et al."
        " 2024, arXiv:2403.08763); false: it stays where it ended",
    )
    optimizer: Literal["keep", "reset"] = Field(
        "keep", description="reset: the optimizer forgets what it remembers of the steps before"
    )


def _read_extend(given: Any) -> Any:
    return [given] if isinstance(given, (dict, Extend)) else given


class Train(Section):
    max_steps: Count | None = Field(None, description="optimizer steps")
    max_tokens: Annotated[float, Field(gt=0)] | None = Field(
        None, description="tokens, rounded up to whole steps"
    )
    epochs: Count | None = Field(None, description="passes over all documents; for sources without weights")
    global_batch_size: Count | None = Field(
        None,
        description="sequences per optimizer step at any world size; 32 if global_batch_tokens is not given",
    )
    global_batch_tokens: Count | None = Field(
        None, description="instead of global_batch_size: tokens per step, a multiple of the block size"
    )
    micro_batch_size: Count | Literal["auto"] = Field(
        "auto",
        description="sequences per forward pass of a worker; auto: on a GPU the largest that fits, found"
        " before the first step; halved when memory runs out",
    )
    lr: Annotated[float, Field(gt=0)] = Field(5e-5, description="peak learning rate")
    embedding_learning_rate: Annotated[float, Field(gt=0)] | None = Field(
        None, description="peak learning rate of the embedding and the head; null: lr"
    )
    scheduler: Literal["cosine", "linear", "constant", "wsd"] = Field(
        "cosine", description="learning rate after the warm-up; wsd: warm-up, stable, decay"
    )
    warmup_ratio: Share = Field(0.05, description="share of the steps in which the learning rate rises")
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = Field(0.0, description="final learning rate / lr")
    decay_ratio: Annotated[float, Field(gt=0, le=1)] = Field(
        0.1, description="share of the steps in which wsd decays the learning rate"
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.0, description="on matrices only, not on norms and biases"
    )
    optimizer: Annotated[Optimizer, BeforeValidator(_read_optimizer)] = Optimizer()
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        1.0, description="gradients are clipped to this norm; null: no clipping"
    )
    mixed_precision: Precision = Field(
        "bf16",
        description="forward and backward passes; weights are updated in fp32 whatever it is."
        " fp16: for GPUs without bf16, its loss is scaled; fp32: exact, without TF32; no: fp32",
    )
    router_aux_loss_coef: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description="weight of the loss that balances the experts of a mixture; null: as the model's"
        " configuration says (router_aux_loss_coef, if it has output_router_logits: true)",
    )
    gradient_checkpointing: Recomputed = Field(
        False,
        description="recompute activations in the backward pass: slower, with less memory. true: all layers;"
        " n, from 2: every n-th layer; selective: all but matrix products and attention (not under zero"
        " stage 3)",
    )
    compile: bool | Literal["auto"] = Field(
        "auto",
        description="compile each layer by torch.compile; auto: on GPUs that have a compiler; not for zero",
    )
    collator: Annotated[str, Field(pattern=r"^[\w.]+:[\w.]+$")] | None = Field(
        None,
        description="module:function, called on each micro batch: may mask labels and add keys;"
        " a run is resumed only with the source code that it began with",
    )
    extend: Annotated[list[Extend], BeforeValidator(_read_extend)] = Field(
        default_factory=list,
        description="goes on with the finished run of this name from its last checkpoint; a list for one"
        " after another. From then on sources may have other weights, and there may be more of them",
    )
    hooks: list[Annotated[str, Field(pattern=r"^[\w.]+:[\w.]+$")]] = Field(
        default_factory=list,
        description="module:Class each, extending raydist.Hook: called at every step, evaluation and commit",
    )
    logging_steps: Count = Field(10, description="steps between records in metrics.jsonl")

    @property
    def has_length(self) -> bool:
        return any(value is not None for value in (self.max_steps, self.max_tokens, self.epochs))


class Stage(Section):
    block_size: Annotated[int, Field(ge=8, le=2**31)] = Field(description="tokens per sequence")
    max_tokens: Annotated[float, Field(gt=0)] = Field(description="tokens, rounded up to whole steps")


class Lora(Section):
    method: Literal["lora"] = Field("lora", description="kind of adapter; LoRA is the only one so far")
    r: Width = Field(16, description="rank of the adapter's matrices")
    alpha: Annotated[float, Field(gt=0)] = Field(
        32, description="the adapter's output is scaled by alpha / r"
    )
    dropout: Share = Field(0.05, description="share of the adapter's inputs dropped in training")
    target_modules: str | list[str] = Field(
        "all-linear", description="names of the modules that get an adapter"
    )
    modules_to_save: list[str] = Field(
        default_factory=list,
        description="names of modules that are trained whole next to the adapter and saved with it, such as"
        " embed_tokens and lm_head",
    )


def _read_config(given: Any) -> Any:
    """The content of the file becomes part of the job, so workers and later resumes do not need the file."""
    if not isinstance(given, str):
        return {} if given is None else given
    try:
        return parse_json(read_limited(Path(given).expanduser()))
    except (OSError, ValueError) as error:
        raise ValueError(f"the DeepSpeed config {given} cannot be read: {error}") from error


class Strategy(Section):
    name: Literal["ddp", "fsdp", "zero"] = Field(
        "ddp",
        description="ddp: whole model on every worker; fsdp: sharded by FSDP2; zero: sharded by DeepSpeed",
    )
    stage: Literal[1, 2, 3] | None = Field(
        None, description="zero only; shards 1: the optimizer, 2: gradients as well, 3: weights as well"
    )
    offload: Literal["none", "cpu"] = Field(
        "none",
        description="zero only; cpu: the optimizer, and at stage 3 the weights, are kept in host memory",
    )
    config: Annotated[dict[str, Any], BeforeValidator(_read_config)] = Field(
        default_factory=dict,
        description="zero only; further DeepSpeed keys, or the path of a JSON file with them",
    )

    @property
    def shards_weights(self) -> bool:
        return self.name == "fsdp" or self.stage == 3


def _read_workers(given: Any) -> Any:
    """A number as it is. A range is checked here, where what is wrong with it can be said."""
    if not isinstance(given, list | tuple):
        return given
    if len(given) != 2 or any(type(n) is not int for n in given):
        raise ValueError(f"a number of workers, or [least, most], not {list(given)!r}")
    least, most = given
    if least < 1 or max(given) > 2**20:
        raise ValueError(f"the range {list(given)!r} leaves 1 to {2**20:,} workers")
    if least > most:
        raise ValueError(f"the range {list(given)!r} is inverted: {least} is more than {most}")
    return least if least == most else (least, most)


Workers = Annotated[Width | tuple[Width, Width], BeforeValidator(_read_workers)]


class Scaling(Section):
    num_workers: Workers = Field(
        1,
        description="training processes; with GPUs, one per GPU. [least, most]: as many as the cluster has"
        " room for when an attempt begins; a lost node shrinks the run, room for more lets it grow",
    )
    grow_after: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        "auto",
        description="seconds that a run with fewer workers than its most trains at least before it makes a"
        " checkpoint and starts again with more; auto: 20 times what its last start took, and only if so much"
        " is left to train that it ends sooner",
    )
    cpus_per_worker: Width | Literal["auto"] = Field(
        "auto",
        description="CPUs reserved for each worker, and its number of threads. auto: on CPU the workers share"
        " what a node has, one left for the data where it has more than two, and a run keeps its number of"
        " threads; on GPUs 1",
    )
    use_gpu: bool | Literal["auto"] = Field(
        "auto", description="auto: if the cluster has a GPU for each worker, of a range for the least"
    )
    max_failures: Annotated[int, Field(ge=0, le=2**48)] = Field(
        3, description="lost workers, and Rays, that one submission survives"
    )
    hang_timeout: Annotated[float, Field(gt=0)] | None = Field(
        1800,
        description="seconds without a step, an evaluation or a checkpoint after which the workers are ended"
        " and the run goes on from its last checkpoint, as when one was lost; null: never",
    )

    @property
    def least(self) -> int:
        """Workers without which an attempt does not begin."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def most(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def elastic(self) -> bool:
        """Whether attempts may have different numbers of workers."""
        return self.least < self.most

    def on_gpus(self, gpus: float) -> bool:
        """Whether each worker takes a GPU, on a cluster with so many GPUs."""
        return gpus >= self.least if self.use_gpu == "auto" else self.use_gpu


class Checkpoint(Section):
    save_steps: Count | Literal["epoch"] = Field(
        100, description="steps between checkpoints; epoch: one at the end of each epoch"
    )
    save_total_limit: Count = Field(3, description="newest checkpoints kept, in addition to the best")
    asynchronous: bool | Literal["auto"] = Field(
        "auto",
        description="training goes on while a checkpoint is written from a copy of weights and optimizer"
        " state in host memory. auto: if there is room for it; true: refused if there is not",
    )
    load_best_model_at_end: bool = Field(
        False, description="model/ gets the best evaluated checkpoint, not the last"
    )


class Guards(Section):
    mode: Literal["off", "record", "on"] = Field(
        "record",
        description="of steps whose loss or gradient norm is no number, or a spike. on: no worker takes them,"
        " and their samples count as skipped (each step waits for the GPU); record: spikes"
        " are recorded with their documents, and a norm that is no number ends the run; off: only the latter",
    )
    window: Annotated[int, Field(ge=20, le=2**16)] = Field(
        128,
        description="steps before it that a step is compared with; none is before half of them were taken",
    )
    threshold: Annotated[float, Field(gt=0)] = Field(
        6.0,
        description="a spike is a loss or gradient norm so many standard deviations (by the median absolute"
        " deviation) above the window's median",
    )
    max_skipped: Count = Field(
        20,
        description="skipped steps in a row, after which weights and optimizer go back to the last good"
        " checkpoint, and the samples since then are skipped",
    )
    max_rollbacks: Annotated[int, Field(ge=0, le=2**48)] = Field(
        3, description="such returns in the whole run; where another one would follow, the run ends"
    )


class Eval(Section):
    eval_steps: Count | Literal["epoch"] = Field(
        100,
        description="steps between evaluations, or epoch; there is also one at the start and one at the end",
    )
    max_tokens: Annotated[float, Field(gt=0)] = Field(
        100_000, description="tokens per source in an evaluation"
    )
    sources: dict[str, Source] = Field(default_factory=dict, description="more text, for evaluation only")
    block_size: Annotated[int, Field(ge=8, le=2**31)] | None = Field(
        None, description="tokens of context in an evaluation; null: the last block size of training"
    )


class Tracking(Section):
    mlflow: bool | str = Field(
        True, description="true: a SQLite database in the storage folder; or a tracking URI"
    )
    tensorboard: bool = Field(False, description="event files in the run's folder, under tensorboard/")
    wandb: bool | str = Field(
        False,
        description="true: project raydist; or a project's name. Files for `wandb sync` are in the run's"
        " folder, under wandb/; WANDB_MODE=online sends them. Needs pip install 'raydist[wandb]'",
    )


class Cluster(Section):
    address: str | None = Field(None, description="Ray's dashboard address, http://host:8265")


class Fields(Section):
    """The keys of a job, each valid by itself. `Job` adds the rules between them."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] = Field(
        description="the run; its folder is <storage>/<name>"
    )
    storage: str = Field(
        "runs",
        description="folder for runs and token logs, which all nodes share; or a prefix of a bucket: s3://,"
        " gs://, az://",
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        0, description="seed of random weights, data order and dropout"
    )
    model: Model
    corpus: Corpus
    prepare: Prepare = Prepare()
    packing: Packing = Packing()
    train: Train
    stages: list[Stage] = Field(
        default_factory=list,
        description="a curriculum: block sizes one after another, each for its max_tokens;"
        " replaces packing.block_size and the length in train",
    )
    adapter: Lora | None = Field(None, description="a LoRA adapter; null: train all weights")
    quantization: Literal["int4", "int8"] | None = Field(
        None, description="bits of the frozen base's weights, by bitsandbytes; needs an adapter"
    )
    strategy: Strategy = Strategy()
    scaling: Scaling = Scaling()
    checkpoint: Checkpoint = Checkpoint()
    guards: Guards = Guards()
    eval: Eval = Eval()
    tracking: Tracking = Tracking()
    cluster: Cluster = Cluster()
    tune: Tune | None = Field(None, description="a sweep, run by raydist tune; null: a single run")

    @property
    def block_sizes(self) -> list[int]:
        """Tokens per sequence, of each stage in order."""
        return [stage.block_size for stage in self.stages] or [self.packing.block_size]

    @property
    def eval_block_size(self) -> int:
        return self.eval.block_size or self.block_sizes[-1]

    def deepspeed(self) -> dict[str, Any]:
        """DeepSpeed's configuration without the batch size; {} under another strategy. Raises ValueError."""
        if self.strategy.stage is None:
            return {}
        return deepspeed_config(
            self.strategy.stage,
            self.strategy.offload,
            self.strategy.config,
            precision=self.train.mixed_precision,
            max_grad_norm=self.train.max_grad_norm,
        )


class Job(Fields):
    """A whole job, from `Job(...)` in Python or from a YAML file.

    Raises JobError with every problem, not pydantic's ValidationError.
    """

    @model_validator(mode="before")
    @classmethod
    def _all_problems(cls, given: Any, info: ValidationInfo) -> Any:
        """info.context: the Places of the values."""
        if not isinstance(given, Job):
            require_valid(Fields, given, info.context or Places())
        return given
