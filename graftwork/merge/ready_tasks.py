"""Ready-made tasks for Hugging Face model folders and local data: nothing has to be written in Python.

    graftwork evaluate ./model --task hf:text-classification,data=reviews.jsonl
    graftwork fisher ./model --task hf:causal-language-model,data=notes.txt -o model.fisher.safetensors

`hf:KIND` stands for a function of this module, with `-` for `_`. The network is what transformers makes of the folder's
`config.json`, always in float32 and never with code from the folder; the checkpoint's values are put into it as for any
other task. Nothing is fetched. Sequences are padded to the right, to the longest of their split, and what is padding
is left out by `attention_mask` everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self

import numpy as np

from graftwork.merge.checkpoint import listed, quoted
from graftwork.merge.errors import DependencyError, TaskError, did_you_mean
from graftwork.merge.task import Task

if TYPE_CHECKING:
    from types import ModuleType

    from torch import Tensor, nn

__all__ = ["causal_language_model", "image_classification", "text_classification"]

Place = Path | str

IGNORED = -100
"""The label of a position that has none."""

_IMAGE_FILES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"})
_TEXT_FILES = (".jsonl", ".txt")
_SPLITS = ("train", "validation", "test")
_TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "*.tiktoken",
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The tasks


def image_classification(
    data: Place,
    *,
    checkpoint: Place,
    test: Place | None = None,
    validation: Place | None = None,
    batch: int = 32,
    name: str | None = None,
) -> Task:
    """Return a task that asks for the class of images.

    Images are prepared as the folder's `preprocessor_config.json` says; without one they are resized to the size in
    `config.json` and scaled to [-1, 1].

    Args:
        data: A folder with a folder of images for each class, or with `train`, `validation` and `test` of that kind;
            or an .npz with `x_train` and `y_train`, and the same for other splits. Images are uint8 (n, height, width)
            or (n, height, width, 3).
        checkpoint: The model's folder.
        test: Test data in a place of their own.
        validation: Validation data in a place of their own.
        batch: Images at once.
        name: The task's name; by default that of the data.

    Raises:
        TaskError: The folder or the data cannot be read, or do not fit each other.
        DependencyError: transformers is missing, or Pillow where it is needed.
    """
    folder = _Folder.open(checkpoint, "AutoModelForImageClassification")
    splits = _places(data, test, validation, suffixes=(".npz",))
    found = {split: _images(folder, place, split) for split, place in splits.items()}
    found |= {
        split: _images(folder, splits["train"], split) for split in _in_npz(splits["train"]) if split not in found
    }
    prepare = folder.image_preparation()

    def batches(split: str) -> Iterator[tuple[Tensor, Tensor]]:
        import torch

        images, labels = found[split]
        for start in range(0, len(labels), batch):
            part = images[start : start + batch]
            yield prepare([image() for image in part]), torch.tensor(labels[start : start + batch])

    def logits(module: nn.Module, images: Tensor) -> Tensor:
        result: Tensor = module(pixel_values=images).logits
        return result

    return folder.task(name or _name_of(data), batches, found, logits, classes=folder.classes)


def text_classification(
    data: Place,
    *,
    checkpoint: Place,
    test: Place | None = None,
    validation: Place | None = None,
    text: str = "text",
    pair: str | None = None,
    label: str = "label",
    length: int = 128,
    batch: int = 32,
    name: str | None = None,
) -> Task:
    """Return a task that asks for the class of texts.

    Args:
        data: A .jsonl file, one object per line; or a folder with `train.jsonl`, `validation.jsonl`, `test.jsonl`.
        checkpoint: The model's folder, with its tokenizer.
        test: Test data in a file of their own.
        validation: Validation data in a file of their own.
        text: Name of the field with the text.
        pair: Name of the field with a second text, if there is one.
        label: Name of the field with the class: its number, or its name in `config.json`.
        length: Tokens after which a text is cut off.
        batch: Texts at once.
        name: The task's name; by default that of the data.

    Raises:
        TaskError: The folder or the data cannot be read, or do not fit each other.
        DependencyError: transformers is missing.
    """
    folder = _Folder.open(checkpoint, "AutoModelForSequenceClassification")
    columns = [text, label] if pair is None else [text, pair, label]

    @cache
    def read(split: str) -> tuple[Mapping[str, Tensor], Tensor]:
        import torch

        rows = list(_rows(splits[split], columns, plain=None))
        labels = torch.tensor([folder.class_of(row[label], place) for place, row in rows])
        pairs = None if pair is None else [str(row[pair]) for _, row in rows]
        return folder.tokens([str(row[text]) for _, row in rows], pairs, length), labels

    splits = _places(data, test, validation, suffixes=(".jsonl",))
    for split in splits:
        read(split)
    return folder.task(
        name or _name_of(data), _in_batches(read, batch), splits, _sequence_logits, classes=folder.classes
    )


def causal_language_model(
    data: Place,
    *,
    checkpoint: Place,
    test: Place | None = None,
    validation: Place | None = None,
    text: str = "text",
    length: int = 128,
    batch: int = 8,
    name: str | None = None,
) -> Task:
    """Return a task that asks for the next token of texts: the loss is the mean over all tokens but the first.

    Logits are (texts, vocabulary, tokens), those of padding are zero; the label of a position is the token after it.
    The exponential of the loss is the perplexity, the accuracy the share of tokens that were the most likely ones.

    Args:
        data: A .txt file, one text per line, or a .jsonl file, one object per line; or a folder with `train`,
            `validation` and `test` of that kind. Lines without two tokens at least are left out.
        checkpoint: The model's folder, with its tokenizer.
        test: Test data in a file of their own.
        validation: Validation data in a file of their own.
        text: Name of the field with the text, in .jsonl files.
        length: Tokens after which a text is cut off.
        batch: Texts at once.
        name: The task's name; by default that of the data.

    Raises:
        TaskError: The folder or the data cannot be read, or do not fit each other.
        DependencyError: transformers is missing.
    """
    folder = _Folder.open(checkpoint, "AutoModelForCausalLM")

    @cache
    def read(split: str) -> tuple[Mapping[str, Tensor], Tensor]:
        texts = [str(row[text]) for _, row in _rows(splits[split], [text], plain=text)]
        tokens = folder.tokens(texts, None, length, at_least=2)
        if not len(tokens["input_ids"]):
            raise TaskError(f"cannot read {splits[split]}: none of its texts has two tokens; give it longer ones")
        ids, mask = tokens["input_ids"], tokens["attention_mask"].bool()
        labels = ids.new_full(ids.shape, IGNORED)
        labels[:, :-1] = ids[:, 1:].masked_fill(~mask[:, 1:], IGNORED)
        return {"input_ids": ids, "attention_mask": tokens["attention_mask"]}, labels

    def logits(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        # Padding predicts nothing, whatever the model is: so it has no part in losses without labels either.
        found = _sequence_logits(module, inputs).transpose(1, 2)
        return found.masked_fill(inputs["attention_mask"][:, None] == 0, 0)

    splits = _places(data, test, validation, suffixes=_TEXT_FILES)
    for split in splits:
        read(split)
    return folder.task(name or _name_of(data), _in_batches(read, batch), splits, logits, classes=None)


def _sequence_logits(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    result: Tensor = module(**inputs).logits
    return result


def _in_batches(
    read: Callable[[str], tuple[Mapping[str, Tensor], Tensor]], size: int
) -> Callable[[str], Iterator[tuple[Mapping[str, Tensor], Tensor]]]:
    def batches(split: str) -> Iterator[tuple[Mapping[str, Tensor], Tensor]]:
        inputs, labels = read(split)
        for start in range(0, len(labels), size):
            rows = slice(start, start + size)
            yield {name: values[rows] for name, values in inputs.items()}, labels[rows]

    return batches


# ---------------------------------------------------------------------------------------------------------------------
# The model's folder


@dataclass(frozen=True, slots=True)
class _Folder:
    """A model folder, and the class of transformers that its network is made with."""

    path: Path
    kind: str
    config: Any

    @classmethod
    def open(cls, checkpoint: Place, kind: str) -> _Folder:
        path = Path(checkpoint).expanduser()
        if path.is_file():
            path = path.parent
        if not (path / "config.json").is_file():
            raise TaskError(
                f"cannot make a task for {quoted(path)}: it has no config.json, which says what the network is; name "
                "a folder that has one: …,checkpoint=FOLDER"
            )
        library = _transformers()
        try:
            config = library.AutoConfig.from_pretrained(path, local_files_only=True)
        except Exception as error:
            _not_read(error, f"the configuration of {quoted(path)}")
        return cls(path, kind, config)

    @property
    def classes(self) -> int:
        return int(self.config.num_labels)

    def network(self) -> nn.Module:
        """Return a fresh network in float32."""
        library = _transformers()
        try:
            module: nn.Module = getattr(library, self.kind).from_config(self.config)
        except Exception as error:
            _not_read(error, f"the network of {quoted(self.path)}")
        module.config.use_cache = False  # type: ignore[union-attr]
        return _as_saved(module.float()).eval()

    def task(
        self,
        name: str,
        batches: Callable[[str], Iterator[tuple[Any, Tensor]]],
        splits: Mapping[str, Any],
        logits: Callable[[nn.Module, Any], Tensor],
        *,
        classes: int | None,
    ) -> Task:
        """Return the task with those splits that there are."""
        held = {split: partial(batches, split) for split in _SPLITS if split in splits}
        return Task(
            name, model=self.network, batches=held["train"], validation=held.get("validation"), test=held.get("test"),
            logits=logits, head=self.head(classes),
        )  # fmt: skip

    def head(self, classes: int | None) -> str | None:
        """Return the name of the layer that gives the logits: the last linear one of that many outputs."""
        import torch
        from torch import nn

        with torch.device("meta"):
            module = self.network()
        wanted = getattr(self.config, "vocab_size", None) if classes is None else classes
        found = [
            name for name, part in module.named_modules() if isinstance(part, nn.Linear) and part.out_features == wanted
        ]
        return found[-1] if found else None

    def class_of(self, label: Any, place: str) -> int:
        """Return the number of a class that is given by its number or its name."""
        names: Mapping[str, int] = self.config.label2id
        if isinstance(label, str) and label in names:
            return int(names[label])
        if isinstance(label, int) and not isinstance(label, bool):
            if 0 <= label < self.classes:
                return label
            raise TaskError(f"cannot use {place}: the class is {label}, the model has {self.classes} (0 is the first)")
        hint = did_you_mean(str(label), names) or f"; config.json has {listed(list(names), 5)}"
        raise TaskError(f"cannot use {place}: the class is {label!r}, which the model does not know{hint}")

    # -- texts

    def tokens(
        self, texts: Sequence[str], pairs: Sequence[str] | None, length: int, *, at_least: int = 1
    ) -> Mapping[str, Tensor]:
        """Return the tokens of texts, padded to the right, with `attention_mask`.

        Args:
            texts: The texts.
            pairs: A second text for each.
            length: After how many tokens a text is cut off.
            at_least: Texts with fewer tokens are left out.
        """
        import torch

        tokenizer = self._tokenizer()
        if not texts:
            return {name: torch.zeros((0, 0), dtype=torch.long) for name in ("input_ids", "attention_mask")}
        try:
            found = tokenizer(list(texts), None if pairs is None else list(pairs), truncation=True, max_length=length)
        except Exception as error:
            _not_read(error, f"tokens with the tokenizer of {quoted(self.path)}")
        # A tokenizer that counts parts says nothing on whether the network wants to know.
        parts = ["token_type_ids"] if getattr(self.config, "type_vocab_size", 0) > 1 else []
        keys = [key for key in ("input_ids", *parts) if key in found]
        kept = [number for number, ids in enumerate(found["input_ids"]) if len(ids) >= at_least]
        longest = max((len(found["input_ids"][number]) for number in kept), default=0)
        padding = {"input_ids": self.padding(tokenizer), "token_type_ids": 0}
        largest = max((max(found["input_ids"][number], default=0) for number in kept), default=0)
        words = getattr(self.config, "vocab_size", None)
        if words is not None and largest >= words:
            raise TaskError(
                f"cannot use the tokenizer of {quoted(self.path)}: it gives the token {largest}, config.json says that "
                f"there are {words}; use the tokenizer that belongs to the model"
            )
        result = {
            key: torch.tensor(
                [[*found[key][number], *[padding[key]] * (longest - len(found[key][number]))] for number in kept],
                dtype=torch.long,
            )
            for key in keys
        }
        mask = [[position < len(found["input_ids"][number]) for position in range(longest)] for number in kept]
        return {**result, "attention_mask": torch.tensor(mask, dtype=torch.long)}

    def padding(self, tokenizer: Any) -> int:
        """Return the token that pads; classifiers that look at the last token learn of it through the configuration."""
        known = (tokenizer.pad_token_id, getattr(self.config, "pad_token_id", None), tokenizer.eos_token_id)
        chosen = next((int(token) for token in known if token is not None), 0)
        if getattr(self.config, "pad_token_id", None) is None:
            self.config.pad_token_id = chosen
        return chosen

    def _tokenizer(self) -> Any:
        if not any(file for pattern in _TOKENIZERS for file in self.path.glob(pattern)):
            raise TaskError(
                f"cannot read texts with {quoted(self.path)}: it has no tokenizer; copy the tokenizer's files into it, "
                "or name a folder that has them: …,checkpoint=FOLDER"
            )
        try:
            return _transformers().AutoTokenizer.from_pretrained(self.path, local_files_only=True)
        except Exception as error:
            _not_read(error, f"the tokenizer of {quoted(self.path)}")

    # -- images

    def image_preparation(self) -> Callable[[Sequence[np.ndarray[Any, Any]]], Tensor]:
        """Return what makes a batch (n, channels, height, width) of uint8 images (height, width, 3)."""
        if (self.path / "preprocessor_config.json").is_file():
            try:
                processor = _transformers().AutoImageProcessor.from_pretrained(self.path, local_files_only=True)
            except ImportError as error:
                raise DependencyError(_first_line(error)) from None
            except Exception as error:
                _not_read(error, f"the preprocessor of {quoted(self.path)}")

            def prepared(images: Sequence[np.ndarray[Any, Any]]) -> Tensor:
                found: Tensor = processor(images=list(images), return_tensors="pt")["pixel_values"]
                return found

            return prepared
        return self._resized

    def _resized(self, images: Sequence[np.ndarray[Any, Any]]) -> Tensor:
        import torch
        from torch.nn.functional import interpolate

        size = getattr(self.config, "image_size", None)
        wanted = tuple(size) if isinstance(size, list | tuple) else (size, size) if size else images[0].shape[:2]
        rows = []
        for image in images:
            values = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
            if tuple(values.shape[2:]) != wanted:
                is_larger = values.shape[2] > wanted[0] or values.shape[3] > wanted[1]
                values = interpolate(values, wanted, mode="bilinear", antialias=is_larger, align_corners=False)
            rows.append(values)
        found = torch.cat(rows)
        return found.mean(1, keepdim=True) if getattr(self.config, "num_channels", 3) == 1 else found


def _as_saved(network: nn.Module) -> nn.Module:
    """Return a network whose tensors have the names that they have in files.

    Since version 5, transformers gives some networks other names than their files and translates between the two.
    Where that is more than other names, the network is returned as it is.
    """
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before version 5
        return network
    state = dict(network.state_dict(keep_vars=True))
    try:
        saved = revert_weight_conversion(network, dict(state))
    except Exception as error:
        _not_read(error, f"the names of the tensors of {type(network).__name__}")
    names: dict[str, str] = {}
    left = {name: tensor for name, tensor in state.items() if saved.get(name) is not tensor}
    if not left:
        return network
    for name, tensor in saved.items():
        own = [known for known, held in state.items() if held is tensor and known not in names]
        names |= {own[0]: name} if own else {}
    return _translated(network, names) if len(names) == len(state) else network


def _translated(network: nn.Module, names: Mapping[str, str]) -> nn.Module:
    """Return a network with other names for its tensors: the same parameters, in a tree that has those names."""
    from torch import nn

    class Translated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = (network,)  # in a tuple, so that its own names are not found
            self.config = network.config

        def forward(self, *arguments: Any, **keywords: Any) -> Any:
            return self.network[0](*arguments, **keywords)

        def train(self, mode: bool = True) -> Self:
            self.network[0].train(mode)
            return super().train(mode)

        def _apply(self, *arguments: Any, **keywords: Any) -> Self:
            self.network[0]._apply(*arguments, **keywords)  # type: ignore[no-untyped-call]
            super()._apply(*arguments, **keywords)  # type: ignore[no-untyped-call]
            return self

    def place(path: str, module: nn.Module) -> bool:
        """Put a module where all of its tensors get their names, or else its parts; say whether that is possible."""
        inside = [name for name in names if name.startswith(f"{path}.")]
        if not inside:
            return True
        rest = inside[0][len(path) :]
        target = names[inside[0]].removesuffix(rest)
        if target and all(names[name] == target + name[len(path) :] for name in inside):
            *folders, last = target.split(".")
            parent: nn.Module = tree
            for folder in folders:
                if folder not in parent._modules:
                    parent.add_module(folder, nn.Module())
                parent = parent.get_submodule(folder)
            parent.add_module(last, module)
            return True
        if any(name.count(".") == path.count(".") + 1 for name in inside):
            return False
        return all(place(f"{path}.{name}", part) for name, part in module.named_children())

    tree = Translated()
    fits = all(place(name, part) for name, part in network.named_children())
    return tree if fits and set(tree.state_dict()) == set(names.values()) else network


@cache
def _transformers() -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise DependencyError(
            f"ready-made tasks need transformers, which is missing ({_first_line(error)}); install it with "
            'pip install "graftwork[transformers]"'
        ) from None
    transformers.logging.set_verbosity_error()
    found: ModuleType = transformers
    return found


def _not_read(error: Exception, what: str) -> NoReturn:
    if isinstance(error, TaskError):
        raise error
    raise TaskError(f"cannot read {what}: {type(error).__name__}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


# ---------------------------------------------------------------------------------------------------------------------
# Data


def _name_of(data: Place) -> str:
    return Path(data).stem


def _places(data: Place, test: Place | None, validation: Place | None, suffixes: Sequence[str]) -> dict[str, Path]:
    """Return where each split is; `train` always is one of them."""
    place = Path(data).expanduser()
    if not place.exists():
        near = [file.name for file in place.parent.iterdir()] if place.parent.is_dir() else []
        raise TaskError(f"cannot read the data {quoted(place)}: there is no such file{did_you_mean(place.name, near)}")
    found: dict[str, Path] = {}
    if place.is_dir():
        for split in _SPLITS:
            candidates = [place / split, *(place / f"{split}{suffix}" for suffix in suffixes)]
            there = [candidate for candidate in candidates if candidate.exists()]
            if there:
                found[split] = there[0]
        is_text = ".npz" not in suffixes
        if is_text and "train" not in found:
            raise TaskError(
                f"cannot read the data {quoted(place)}: the folder has no train{suffixes[0]}; name a file, or call the "
                f"files in it {', '.join(f'{split}{suffixes[0]}' for split in _SPLITS)}"
            )
        found.setdefault("train", place)
    elif place.suffix not in suffixes:
        raise TaskError(f"cannot read the data {quoted(place)}: its name ends in none of {', '.join(suffixes)}")
    else:
        found["train"] = place
    for split, own in (("test", test), ("validation", validation)):
        if own is not None:
            found |= {split: _places(own, None, None, suffixes)["train"]}
    return found


def _rows(path: Path, columns: Sequence[str], *, plain: str | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield where each row stands, and its fields; a line of a .txt file is the field `plain`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"cannot read the data {quoted(path)}: {error}") from None
    count = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        row: Any = {plain: line}
        if path.suffix == ".jsonl":
            try:
                row = json.loads(line)
            except ValueError as error:
                raise TaskError(f"cannot read {place}: {error}; each line has to be a JSON object") from None
        if not isinstance(row, dict):
            raise TaskError(f"cannot read {place}: it is {type(row).__name__}, not a JSON object")
        for column in columns:
            if column not in row:
                near = did_you_mean(column, row) or f"; it has {listed(list(row), 5)}"
                raise TaskError(f"cannot read {place}: it has no field {quoted(column)}{near}")
        count += 1
        yield place, row
    if not count:
        raise TaskError(f"cannot read the data {quoted(path)}: it is empty")


Image = Callable[[], np.ndarray[Any, Any]]


def _in_npz(path: Path) -> list[str]:
    """Return which splits a file of arrays has."""
    if path.suffix != ".npz":
        return []
    held = _arrays(path)
    return [split for split in _SPLITS if f"x_{split}" in held]


@cache
def _arrays(path: Path) -> Mapping[str, np.ndarray[Any, Any]]:
    try:
        with np.load(path) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError) as error:
        raise TaskError(f"cannot read the data {quoted(path)}: {_first_line(error)}") from None


def _images(folder: _Folder, place: Path, split: str) -> tuple[list[Image], list[int]]:
    """Return what gives each image (height, width, 3) of a split, and their classes."""
    if place.suffix == ".npz":
        return _images_of_arrays(folder, place, split)
    classes = sorted(path.name for path in place.iterdir() if path.is_dir() and not path.name.startswith("."))
    named: Mapping[str, int] = folder.config.label2id
    if not classes:
        raise TaskError(
            f"cannot read the data {quoted(place)}: it has no folders; put the images of each class into a folder of "
            "its own"
        )
    if not all(name in named for name in classes) and len(classes) != folder.classes:
        unknown = next(name for name in classes if name not in named)
        raise TaskError(
            f"cannot read the data {quoted(place)}: there are {len(classes)} folders, the model has {folder.classes} "
            f"classes, and {quoted(unknown)} is none of their names{did_you_mean(unknown, named)}"
        )
    images: list[Image] = []
    labels: list[int] = []
    for number, name in enumerate(classes):
        files = sorted(path for path in (place / name).iterdir() if path.suffix.lower() in _IMAGE_FILES)
        images += [partial(_pixels, file) for file in files]
        labels += [int(named[name]) if all(each in named for each in classes) else number] * len(files)
    if not images:
        raise TaskError(f"cannot read the data {quoted(place)}: its folders have no images ({', '.join(_IMAGE_FILES)})")
    return images, labels


def _images_of_arrays(folder: _Folder, place: Path, split: str) -> tuple[list[Image], list[int]]:
    held = _arrays(place)
    names = (f"x_{split}", f"y_{split}")
    missing = [name for name in names if name not in held]
    if missing:
        raise TaskError(
            f"cannot read the data {quoted(place)}: it has no {' and no '.join(missing)}; it has "
            f"{listed(list(held), 6)}"
        )
    pixels, classes = (held[name] for name in names)
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or (pixels.ndim == 4 and pixels.shape[-1] != 3):
        raise TaskError(
            f"cannot read the data {quoted(place)}: {names[0]} is {pixels.dtype} {pixels.shape}, not uint8 (n, height, "
            "width) or (n, height, width, 3)"
        )
    if len(pixels) != len(classes) or not len(pixels):
        raise TaskError(f"cannot read the data {quoted(place)}: it has {len(pixels)} images and {len(classes)} classes")
    labels = [folder.class_of(int(label), f"{place}: {names[1]}[{row}]") for row, label in enumerate(classes)]
    return [partial(_coloured, image) for image in pixels], labels


def _coloured(image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.repeat(image[..., None], 3, -1) if image.ndim == 2 else image


def _pixels(file: Path) -> np.ndarray[Any, Any]:
    try:
        from PIL import Image as Pillow
    except ImportError:
        raise DependencyError(
            'images are read by Pillow, which is missing; install it with pip install "graftwork[transformers]"'
        ) from None
    try:
        with Pillow.open(file) as opened:
            return np.asarray(opened.convert("RGB"))
    except OSError as error:
        raise TaskError(f"cannot read the image {quoted(file)}: {_first_line(error)}") from None
