"""`/tokenize`, `/detokenize`, `/tokenizer_info`: a variant's tokenizer, in vLLM's form."""

from typing import Annotated, Any

from fastapi import APIRouter, Query

from moemerge.checkpoint.tokenizer import load_json
from moemerge.server.body import JsonRoute
from moemerge.server.chat import encode_messages
from moemerge.server.requests import DetokenizeBody, TokenizeBody
from moemerge.server.responses import Text, Tokens
from moemerge.server.serving import ServingOf

_ModelQuery = Annotated[str | None, Query(max_length=256)]

tokens = APIRouter(tags=["tokens"], route_class=JsonRoute)


@tokens.post("/tokenize", response_model_exclude_none=True)
def tokenize(body: TokenizeBody, serving: ServingOf) -> Tokens:
    """Token ids of a text or of a conversation.

    Without `model` any variant's, if all have one tokenizer; so in `/detokenize` and `/tokenizer_info`.
    """
    variant = serving.require_tokenizer(body.model)
    if body.messages is not None:
        ids = encode_messages(
            variant,
            body.messages,
            add_special_tokens=bool(body.add_special_tokens),
            add_generation_prompt=body.add_generation_prompt,
            variables=body.chat_template_kwargs,
        )
    else:
        ids = variant.text.encode(body.prompt or "", add_special_tokens=body.add_special_tokens is not False)
    tokenizer = variant.text.tokenizer
    return Tokens(
        count=len(ids),
        max_model_len=serving.service.limits_of(variant.text.name).context_tokens,
        tokens=list(ids),
        token_strs=[tokenizer.token(i) or "" for i in ids] if body.return_token_strs else None,
    )


@tokens.post("/detokenize")
def detokenize(body: DetokenizeBody, serving: ServingOf) -> Text:
    """The text of token ids, special tokens included."""
    tokenizer = serving.require_tokenizer(body.model).text.tokenizer
    return Text(prompt=tokenizer.decode(body.tokens, skip_special_tokens=False))


@tokens.get("/tokenizer_info")
def show_tokenizer(serving: ServingOf, model: _ModelQuery = None) -> dict[str, Any]:
    """A variant's tokenizer configuration, with special tokens as text, and its chat template."""
    text = serving.require_tokenizer(model).text
    config = load_json(lambda file: serving.bundle.side_file(text.name, file), "tokenizer_config.json")
    plain = {key: value["content"] if _is_token(value) else value for key, value in config.items()}
    stop = [text.tokenizer.token(token_id) for token_id in sorted(text.stop_ids)]
    template = text.chat_template.sources.get("default") if text.chat_template else None
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": stop[0] if stop else None,
        "pad_token": None,
        **plain,
        "chat_template": template,
    }


def _is_token(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("content"), str)
