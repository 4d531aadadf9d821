"""What the files beside a vocabulary say: special tokens, flags, chat templates.

These are tokenizer_config.json, special_tokens_map.json, added_tokens.json, generation_config.json and
the files of chat templates, as transformers reads and writes them. Each may be missing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AliasChoices, BaseModel, BeforeValidator, Field, NonNegativeInt, ValidationError

from tenfold.chat_template import ChatTemplate
from tenfold.errors import TenfoldError
from tenfold.files import read_json
from tenfold.parsed import first_problem


def _content(value: Any) -> Any:
    """A token is its text, or a table with its text."""
    return value.get("content") if isinstance(value, dict) else value


TokenText = Annotated[str, BeforeValidator(_content)]


class SpecialTokensMap(BaseModel):
    """special_tokens_map.json."""

    bos_token: TokenText | None = None
    eos_token: TokenText | None = None
    unk_token: TokenText | None = None
    sep_token: TokenText | None = None
    pad_token: TokenText | None = None
    cls_token: TokenText | None = None
    mask_token: TokenText | None = None
    additional_special_tokens: list[TokenText] | dict[str, TokenText] | None = Field(
        None, validation_alias=AliasChoices("additional_special_tokens", "extra_special_tokens")
    )


class AddedTokenEntry(BaseModel):
    """A value of `added_tokens_decoder`; the names are those of `tokenizers.AddedToken`."""

    content: str = Field(min_length=1)
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False
    special: bool = False


class NamedTemplate(BaseModel):
    """An entry of a `chat_template` that is a list."""

    name: str
    template: str


class TemplateJson(BaseModel):
    """chat_template.json, which repositories of multimodal models have."""

    chat_template: str | list[NamedTemplate] | None = None


class TokenizerConfig(SpecialTokensMap):
    """tokenizer_config.json: the fields that change ids or prompts."""

    tokenizer_class: str | None = None
    extra_ids: int = Field(100, ge=0, le=10_000)  # sentinels of T5
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    add_prefix_space: bool | None = None
    legacy: bool | None = None
    added_tokens_decoder: dict[NonNegativeInt, AddedTokenEntry] | None = None
    chat_template: str | list[NamedTemplate] | None = None


class GenerationConfig(BaseModel):
    """generation_config.json: the tokens that end an answer."""

    eos_token_id: NonNegativeInt | list[NonNegativeInt] | None = None


@dataclass(frozen=True)
class TokenizerFiles:
    """All that the files in a folder say, in one place."""

    config: TokenizerConfig
    special_tokens: dict[str, str]
    """By role ("bos_token")."""
    more_special: tuple[str, ...]
    added_tokens: dict[int, AddedTokenEntry]
    ends: tuple[int, ...]
    chat_template: ChatTemplate | None


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Raises TenfoldError naming the file and field that is wrong."""
    config = _read(folder / "tokenizer_config.json", TokenizerConfig)
    special = config.model_dump(include=set(SpecialTokensMap.model_fields), exclude_none=True)
    if config.added_tokens_decoder is None:  # transformers: the newer way of saying it is the only one read
        older = _read(folder / "special_tokens_map.json", SpecialTokensMap)
        special |= older.model_dump(exclude_none=True)
    more = special.pop("additional_special_tokens", ())
    ends = _read(folder / "generation_config.json", GenerationConfig).eos_token_id
    return TokenizerFiles(
        config=config,
        special_tokens=special,
        more_special=tuple(more.values() if isinstance(more, dict) else more),
        added_tokens=config.added_tokens_decoder or dict(_older_added_tokens(folder)),
        ends=tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,),
        chat_template=_chat_template(folder, config),
    )


Schema = TypeVar("Schema", bound=BaseModel)


def _read(file: Path, schema: type[Schema]) -> Schema:
    """An object from a JSON file; an empty one if there is no such file."""
    try:
        return schema.model_validate(read_json(file) if file.is_file() else {})
    except ValidationError as error:
        raise TenfoldError(f"{file}: {first_problem(error)}") from None


def _older_added_tokens(folder: Path) -> Iterator[tuple[int, AddedTokenEntry]]:
    """added_tokens.json: ids by text."""
    file = folder / "added_tokens.json"
    ids = read_json(file) if file.is_file() else {}
    if not isinstance(ids, dict) or not all(type(i) is int and i >= 0 and text for text, i in ids.items()):
        raise TenfoldError(f"{file}: expected an object of token ids by text")
    for text, token in ids.items():
        yield token, AddedTokenEntry(content=text)


def _chat_template(folder: Path, config: TokenizerConfig) -> ChatTemplate | None:
    """Files of their own win over tokenizer_config.json, as in transformers."""
    templates = {
        file.stem: _text(file) for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))
    }
    if (folder / "chat_template.jinja").is_file():
        templates["default"] = _text(folder / "chat_template.jinja")
    if not templates:
        given = config.chat_template or _read(folder / "chat_template.json", TemplateJson).chat_template
        if isinstance(given, list):
            templates = {entry.name: entry.template for entry in given}
        elif given is not None:
            templates = {"default": given}
    return ChatTemplate(templates, str(folder)) if templates else None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise TenfoldError(f"{file}: not readable as text ({error})") from None
