"""Small tokenizers of the kinds that checkpoints bring along, with vocabularies made by hand."""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel

from moemerge.checkpoint.tokenizer import VariantTokenizer

WORDS = ["hello", " world", "é", "日本", "日", "😀", " ", "\n\n", "the", ".", " n't"]


def _bytes_of(text):
    return "".join(
        token for token, _ in ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    )


def byte_level():
    """GPT-2 and most newer ones: bytes, among them tokens that begin and end within characters."""
    characters = _bytes_of("日本😀é")
    parts = [characters[i : i + n] for n in (2, 3, 4) for i in range(len(characters) - n)]
    tokens = dict.fromkeys(
        ["<unk>", "<s>", "</s>", *sorted(ByteLevel.alphabet()), *map(_bytes_of, WORDS), *parts]
    )
    tokenizer = Tokenizer(
        models.BPE(vocab={t: n for n, t in enumerate(tokens)}, merges=[], unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.add_tokens(["<tool>"])
    return tokenizer


def byte_fallback():
    """Llama and Mixtral: words with `▁`, and single bytes for what the vocabulary lacks."""
    words = ["▁", "▁▁", "▁hello", "hello", "▁world", "é", "日", *"abcdehlorwtn.", "▁.", "\n"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocab = {token: n for n, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def metaspace():
    """T5 and Switch: sentencepiece unigrams."""
    words = ["▁", "▁hello", "hello", "▁world", "é", "日", *"abcdehlorwtn.", "▁.", "▁▁"]
    vocab = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        *((word, -1.0 - n / 100) for n, word in enumerate(words)),
    ]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    return tokenizer


def word_piece():
    """BERT: a space in front of all that does not begin with `##`."""
    tokens = ["[UNK]", "[CLS]", "[SEP]", "hello", "##lo", "world", ".", ",", "n't", "##n", "do", "##日", "a"]
    tokenizer = Tokenizer(models.WordPiece({t: n for n, t in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[UNK]", "[CLS]", "[SEP]"])
    return tokenizer


def end_of_word():
    """GPT-1 and CLIP: a space behind all that ends with `</w>`."""
    tokens = ["<unk>", "<s>", "</s>", "hel", "lo</w>", "a</w>", "world</w>", "wor", ".</w>", "ld"]
    tokenizer = Tokenizer(
        models.BPE(vocab={t: n for n, t in enumerate(tokens)}, merges=[], unk_token="<unk>")
    )
    tokenizer.decoder = decoders.BPEDecoder()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


KINDS = {
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "metaspace": metaspace,
    "word_piece": word_piece,
    "end_of_word": end_of_word,
}


def variant_tokenizer(kind):
    return VariantTokenizer(KINDS[kind](), frozenset({2}))
