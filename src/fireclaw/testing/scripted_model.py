"""A scripted model: a tiny GGUF file that a real llama.cpp serves, and that says exactly what a script tells it to.

For tests, of ours and of users: the whole way through server, chat template, tool parser and client is the real one;
only the words are known beforehand. No download, no training, a few megabytes, made in a second::

    write_scripted_model(path, [
        Rule("hello there", user="hello"),
        Rule(call("run_command", command="uname -r"), user="kernel", results=0),
        Rule("it is 6.12", user="kernel", results=1),
        Rule("I do not know"),
    ])

How it works: attention and feed-forward layers are zero, so the next token depends on the last one alone. Embeddings
are random signs, nearly orthogonal; the output matrix maps each token of a reply to the one after it, and everything
else to the end of the turn. Every rule has its own tokens. Which rule speaks is decided by the chat template, which
llama.cpp runs: it looks at the conversation and ends the prompt with the start token of the first rule that matches.

Needs ``gguf`` and ``numpy``, which are imported when they are needed.
"""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final

from fireclaw.llm.catalogue import Entry, ToolSupport
from fireclaw.llm.embedded import EmbeddedServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from fireclaw.llm.embedded import Endpoint

_DIM: Final = 512  # embeddings of random signs in it overlap by 0.04 (one sigma): far below what decides
_HEADS: Final = 8
_HIDDEN: Final = 64
_CONTEXT: Final = 131072
_PIECE: Final = 6  # characters of a reply in one token, so that a reply streams in several
_NEXT_LOGIT: Final = 100.0
_END_LOGIT: Final = 50.0  # of a token without a successor; the overlaps of others stay under 30
_SPACE: Final = "\u2581"  # how this kind of vocabulary writes a space


class _Kind(IntEnum):
    """Types of tokens, as GGUF numbers them."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    BYTE = 6


@dataclass(frozen=True)
class Rule:
    """A reply and when it is given; the first rule that matches speaks.

    Attributes:
        says: the reply, word for word; ``call`` makes one that uses a tool.
        user: text that the last message of a person must contain.
        last: text that the last message of all must contain.
        results: how many tool results there must be since the last message of a person.
        tools: whether tools must be offered (True) or must not be (False).
        endless: the reply is said again and again, until the token limit: a call that takes long.
    """

    says: str
    user: str = ""
    last: str = ""
    results: int | None = None
    tools: bool | None = None
    endless: bool = False

    def condition(self) -> str:
        """The rule's condition, in the template's language."""
        parts = []
        if self.user:
            parts.append(f"{_quote(self.user)} in seen.user")
        if self.last:
            parts.append(f"{_quote(self.last)} in (messages[-1].content or '')")
        if self.results is not None:
            parts.append(f"seen.results == {self.results}")
        if self.tools is not None:
            parts.append("tools" if self.tools else "not tools")
        return " and ".join(parts) or "true"


def call(name: str, **arguments: object) -> str:
    """The words that use a tool, in the form that the scripted model's template teaches llama.cpp to read."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def write_scripted_model(path: Path, rules: Sequence[Rule]) -> None:
    """Write the model file.

    Args:
        path: the GGUF file to make.
        rules: what it says; a conversation that matches none gets an empty reply.

    Raises:
        ImportError: ``gguf`` or ``numpy`` is not installed.
        ValueError: two replies are so short and so alike that they cannot be told apart.
    """
    import gguf  # noqa: PLC0415 - only tests have it
    import numpy as np  # noqa: PLC0415 - only tests have it

    vocabulary = _Vocabulary.of(rules)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("scripted")
    writer.add_context_length(_CONTEXT)
    writer.add_embedding_length(_DIM)
    writer.add_block_count(1)
    writer.add_feed_forward_length(_HIDDEN)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(_DIM // _HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(vocabulary.tokens))
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    _add_tokenizer(writer, vocabulary)
    writer.add_chat_template(_TEMPLATE + _routing(rules))
    for name, weights in _weights(vocabulary, np.random.default_rng(1)).items():
        # norms stay in 32 bits: llama.cpp has no other kernel for them
        writer.add_tensor(name, weights.astype(np.float32 if weights.ndim == 1 else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def scripted_entry(path: Path, rules: Sequence[Rule]) -> Entry:
    """Write the model file and describe it as the catalogue describes its models; it has no sources."""
    write_scripted_model(path, rules)
    data = path.read_bytes()
    return Entry(
        name="scripted",
        title="a scripted model",
        licence="Apache-2.0",
        size=len(data),
        sha256=sha256(data).hexdigest(),
        context=_CONTEXT,
        kv_bytes=2 * 2 * _DIM // _HEADS,
        tools=ToolSupport.NATIVE,
        template="",
        sources=(),
    )


@asynccontextmanager
async def scripted_server(folder: Path, rules: Sequence[Rule], *, context: int = 32768) -> AsyncIterator[Endpoint]:
    """Serve a script by a real llama.cpp in a child process.

    Args:
        folder: where the model file is made.
        rules: what it says.
        context: tokens a call; with this vocabulary a token of a prompt is a character.

    Yields:
        Where it listens, and its key.
    """
    path = folder / "scripted.gguf"
    server = EmbeddedServer(path, scripted_entry(path, rules), context=context, slots=2)
    try:
        yield await server.ensure()
    finally:
        await server.aclose()


@dataclass
class _Vocabulary:
    """The tokens, and which follows which."""

    tokens: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    following: dict[int, int] = field(default_factory=dict)
    end: int = 0

    @classmethod
    def of(cls, rules: Sequence[Rule]) -> _Vocabulary:
        """All bytes and ASCII characters (so that any prompt can be read), then the replies' own tokens."""
        self = cls()
        self._add("<unk>", 0.0, _Kind.UNKNOWN)
        for name in ("<s>", "</s>"):
            self._add(name, 0.0, _Kind.CONTROL)
        for value in range(256):
            self._add(f"<0x{value:02X}>", 0.0, _Kind.BYTE)
        for value in range(32, 127):
            self._add(chr(value), -1000.0, _Kind.NORMAL)
        self._add("<|im_start|>", 0.0, _Kind.CONTROL)
        self.end = self._add("<|im_end|>", 0.0, _Kind.CONTROL)
        for number, rule in enumerate(rules):
            self._add_reply(number, rule)
        return self

    def _add(self, text: str, score: float, kind: _Kind) -> int:
        self.tokens.append(text.replace(" ", _SPACE))
        self.scores.append(score)
        self.kinds.append(int(kind))
        return len(self.tokens) - 1

    def _add_reply(self, number: int, rule: Rule) -> None:
        start = last = self._add(_start_token(number), 0.0, _Kind.CONTROL)
        for piece in self._cut(rule.says):
            # A low score: the tokenizer must not use a reply's tokens to read prompts.
            token = self._add(piece, -2000.0, _Kind.NORMAL)
            self.following[last] = token
            last = token
        self.following[last] = self.following[start] if rule.endless else self.end

    def _cut(self, text: str) -> list[str]:
        """Cut a reply into pieces that are no tokens yet: each must have one successor of its own."""
        used = {token.replace(_SPACE, " ") for token in self.tokens}
        pieces: list[str] = []
        start = 0
        while start < len(text):
            end = min(start + _PIECE, len(text))
            while text[start:end] in used and end < len(text):
                end += 1
            piece = text[start:end]
            while piece in used:  # the tail is taken: join it to what comes before it
                if not pieces:
                    raise ValueError(f"the reply {text!r} cannot be told from another one")
                used.discard(pieces[-1])
                piece = pieces.pop() + piece
            used.add(piece)
            pieces.append(piece)
            start = end
        return pieces


def _add_tokenizer(writer: Any, vocabulary: _Vocabulary) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.kinds)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_pad_token_id(2)
    writer.add_eos_token_id(vocabulary.end)
    writer.add_eot_token_id(vocabulary.end)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)


def _weights(vocabulary: _Vocabulary, random: np.random.Generator) -> dict[str, NDArray[np.floating[Any]]]:
    """All tensors. Channel 0 of each embedding is the constant 1 and carries the logit of the end of the turn."""
    import numpy as np  # noqa: PLC0415 - only tests have it

    size = len(vocabulary.tokens)
    embedding = random.choice([-1.0, 1.0], (size, _DIM)) / np.sqrt(_DIM - 1)
    embedding[:, 0] = 1.0
    gain = np.sqrt(2.0 / _DIM)  # undoes the last norm: an embedding's square is 2
    output = np.zeros((size, _DIM))
    for token, following in vocabulary.following.items():
        if following != vocabulary.end:
            output[following, 1:] += _NEXT_LOGIT * gain * embedding[token, 1:]
    output[vocabulary.end, 0] = _END_LOGIT * gain
    head = _DIM // _HEADS
    return {
        "token_embd.weight": embedding,
        "blk.0.attn_norm.weight": np.ones(_DIM),
        "blk.0.attn_q.weight": np.zeros((_DIM, _DIM)),
        "blk.0.attn_k.weight": np.zeros((head, _DIM)),
        "blk.0.attn_v.weight": np.zeros((head, _DIM)),
        "blk.0.attn_output.weight": np.zeros((_DIM, _DIM)),
        "blk.0.ffn_norm.weight": np.ones(_DIM),
        "blk.0.ffn_gate.weight": np.zeros((_HIDDEN, _DIM)),
        "blk.0.ffn_up.weight": np.zeros((_HIDDEN, _DIM)),
        "blk.0.ffn_down.weight": np.zeros((_DIM, _HIDDEN)),
        "output_norm.weight": np.ones(_DIM),
        "output.weight": output,
    }


# The turns of ChatML; tools in the words that llama.cpp knows from Hermes and Qwen, so that it parses calls.
_TEMPLATE: Final = """
{%- set seen = namespace(user='', results=0) -%}
{%- for message in messages -%}
  {%- if message.role == 'user' -%}
    {%- set seen.user = message.content or '' -%}{%- set seen.results = 0 -%}
  {%- elif message.role == 'tool' -%}
    {%- set seen.results = seen.results + 1 -%}
  {%- endif -%}
{%- endfor -%}
{%- if tools -%}
  {{- '<|im_start|>system\\n# Tools\\nFunction signatures are within <tools></tools>:\\n<tools>' -}}
  {%- for tool in tools -%}{{- '\\n' + (tool | tojson) -}}{%- endfor -%}
  {{- '\\n</tools>\\nReturn a json object within <tool_call></tool_call> tags:\\n' -}}
  {{- '<tool_call>\\n{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
  {%- if message.role == 'assistant' -%}
    {{- '<|im_start|>assistant\\n' -}}
    {%- if message.content -%}{{- message.content -}}{%- endif -%}
    {%- for tool_call in message.tool_calls or [] -%}
      {%- set function = tool_call.function -%}
      {%- if message.content or not loop.first -%}{{- '\\n' -}}{%- endif -%}
      {{- '<tool_call>\\n{"name": "' + function.name + '", "arguments": ' -}}
      {{- function.arguments | tojson -}}
      {{- '}\\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\\n' -}}
  {%- elif message.role == 'tool' -%}
    {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' -}}
  {%- else -%}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
  {%- endif -%}
{%- endfor -%}
"""


def _routing(rules: Sequence[Rule]) -> str:
    """The end of the template: the start token of the first rule that matches."""
    lines = ["{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}"]
    for number, rule in enumerate(rules):
        word = "elif" if number else "if"
        lines.append(f"{{%- {word} {rule.condition()} -%}}{{{{- '{_start_token(number)}' -}}}}")
    lines.append("{%- endif -%}{%- endif -%}" if rules else "{%- endif -%}")
    return "\n".join(lines)


def _start_token(number: int) -> str:
    return f"<|reply{number}|>"


def _quote(text: str) -> str:
    """A string literal of the template's language."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
