"""Texts as ids from 0, and back: what a Tokenizer takes as its text codec.

    WordText    a fixed list of words
    ByteText    UTF-8 bytes
    HFText      a tokenizer of Hugging Face, with .special: ids that it has already

Each has .size, .encode(str) -> list and .decode(ids) -> str.
"""

import difflib


class WordText:
    """Ids for a fixed list of words, separated by blanks.

    decode(encode(x)) is x up to runs of blanks.
    """

    def __init__(self, words):
        self.words = list(dict.fromkeys(words))
        self.ids = {word: i for i, word in enumerate(self.words)}
        self.size = len(self.words)

    def encode(self, text: str) -> list:
        for word in text.split():
            if word not in self.ids:
                near = difflib.get_close_matches(word, self.words, 3)
                hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "none is like it"
                raise ValueError(f"unknown word {word!r}: this tokenizer knows {self.size} words, {hint}")
        return [self.ids[word] for word in text.split()]

    def decode(self, ids) -> str:
        return " ".join(self.words[i] for i in ids if 0 <= i < self.size)


class ByteText:
    """UTF-8 bytes as ids 0 to 255: any text, no vocabulary file."""
    size = 256

    def encode(self, text: str) -> list:
        return list(text.encode("utf-8"))

    def decode(self, ids) -> str:
        return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")


# tokens of Emu3's own vocabulary (baaivision/Emu3, emu3/mllm/tokenization_emu3.py), the first image
# code among them
EMU3_TOKENS = {"[PAD]": "<|endoftext|>", "BOS": "<|extra_203|>", "EOS": "<|extra_204|>", "boi": "<|image start|>",
               "img": "<|image token|>", "EOL": "<|extra_200|>", "EOF": "<|extra_201|>", "eoi": "<|image end|>",
               "image codes": "<|visual token 000000|>"}


class HFText:
    """A text tokenizer of Hugging Face as the text codec of a Tokenizer, whose ids are then those
    that were published.

        # or HFText(its tokenizer as it is, no token added, ..)
        HFText.from_pretrained("microsoft/phi-1_5", "showo")
        HFText.from_pretrained("BAAI/Emu3-Chat-hf", "emu3")

    showo: sot and eot are its bos and eos, [PAD], soi .. lvg and the image codes follow behind its
    last id (showlab/Show-o, training/prompting_utils.py). emu3: all special tokens are among its
    own, the image codes end it. Raises ValueError for a tokenizer that lacks one of them.
    """
    merges = True  # a token may span the end of one text and the next's start
    # around a question and an answer: what Show-o was tuned on (showlab/Show-o, inference_mmu.py
    # and
    # llava/llava/conversation.py). Emu3's question stands in its layout; how its answers began is
    # not published
    chats = {"showo": ("USER: \n{} ASSISTANT:", " {}"), "emu3": ("{}", " {}")}

    def __init__(self, tokenizer, backbone: str):
        if backbone not in ("showo", "emu3"):
            raise ValueError(f"HFText: backbone must be showo or emu3, got {backbone!r}")
        showo, self.tokenizer, self.stored = backbone == "showo", tokenizer, None
        names = {"sot": tokenizer.bos_token, "eot": tokenizer.eos_token} if showo else EMU3_TOKENS
        ids = {name: self.find(token) for name, token in names.items()}
        if lacking := [f"{name} ({names[name]})" for name, i in ids.items() if i is None]:
            raise ValueError(f"HFText: this tokenizer is not that of {backbone}, it lacks {', '.join(lacking)}")
        if showo and self.find("[PAD]") is not None:
            raise ValueError("HFText: this tokenizer has a [PAD] already, whose id is given out here: load it anew")
        self.size = ids.pop("image codes", len(tokenizer))
        self.special, self.backbone = ids, backbone

    def find(self, token: str | None) -> int | None:
        """The id of a token, None where there is none (Hugging Face says then: the unknown one)."""
        unknown, i = self.tokenizer.unk_token, token and self.tokenizer.convert_tokens_to_ids(token)
        return None if i is None or (token != unknown and i == self.tokenizer.unk_token_id) else i

    def chat(self, question: str, answer: str = "") -> tuple[str, str]:
        """A question and an answer as the published weights know them."""
        return tuple(form.format(text) for form, text in zip(self.chats[self.backbone], (question, answer)))

    def encode(self, text: str) -> list:
        text.encode("utf-8")                               # a ValueError for what is no Unicode
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids) -> str:
        return self.tokenizer.decode([i for i in ids if 0 <= i < self.size], skip_special_tokens=True,
                                     clean_up_tokenization_spaces=False)

    def state(self) -> dict:
        """Plain data from which `from_state` makes it again: its tokenizer.json and the names of
        three tokens.

        The same in every version of Transformers. ValueError for a slow tokenizer, which has no
        such file.
        """
        if getattr(self.tokenizer, "backend_tokenizer", None) is None:
            raise ValueError(f"a {type(self.tokenizer).__name__} cannot be stored: take a fast tokenizer")
        if self.stored is None:
            names = {name: getattr(self.tokenizer, name) for name in ("bos_token", "eos_token", "unk_token")}
            self.stored = {"json": self.tokenizer.backend_tokenizer.to_str(), "names": names}
        return self.stored

    @classmethod
    def from_state(cls, state: dict, backbone: str) -> "HFText":
        fast = transformers().PreTrainedTokenizerFast
        from tokenizers import Tokenizer as Backend        # comes with transformers
        names = {name: token for name, token in state["names"].items() if token is not None}
        text = cls(fast(tokenizer_object=Backend.from_str(state["json"]), **names), backbone)
        text.stored = state
        return text

    @classmethod
    def from_pretrained(cls, name: str, backbone: str) -> "HFText":
        """By its name (it is downloaded) or from a folder.

        ValueError when there is none, or an empty one.
        """
        auto = transformers().AutoTokenizer
        try:
            tokenizer = auto.from_pretrained(name)
        except ImportError:
            raise
        except Exception as error:  # OSError, KeyError, the bare Exception of tokenizers ..
            raise ValueError(f"{name} is no tokenizer of Hugging Face: {' '.join(str(error).split())}") from None
        text = cls(tokenizer, backbone)
        if not text.encode("a 16*16"):  # what Transformers makes of a folder without tokenizer.json
            raise ValueError(f"{name} is no tokenizer of Hugging Face: it has no id for a letter")
        return text


def transformers():
    """The optional package."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"{error}; tokenizers of Hugging Face need it: pip install transformers") from None
    return transformers


def cut(text: str) -> str:
    """What an error quotes of a text: 100 characters."""
    return text if len(text) <= 100 else text[:100] + " .."
