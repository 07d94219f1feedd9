"""Texts as ids from 0, and back: the text codecs of a Tokenizer.

    WordText    a fixed list of words
    ByteText    UTF-8 bytes
    HFText      a tokenizer of Hugging Face; .special names ids that it already has

Each has .size, .encode(str) -> list of ids, and .decode(ids) -> str, which skips foreign ids.
"""

import difflib


class WordText:
    """A fixed list of words, separated by blanks. decode(encode(x)) is x up to runs of blanks."""

    def __init__(self, words):
        self.words = list(dict.fromkeys(words))
        self.ids = {word: i for i, word in enumerate(self.words)}
        self.size = len(self.words)

    def encode(self, text: str) -> list:
        """ValueError for an unknown word."""
        for word in text.split():
            if word not in self.ids:
                near = difflib.get_close_matches(word, self.words, 3)
                hint = "none is like it"
                if near:
                    hint = f"did you mean {' or '.join(map(repr, near))}?"
                raise ValueError(f"unknown word {word!r}: this tokenizer knows {self.size} words, "
                                 + hint)
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


# our names for tokens of Emu3's vocabulary (baaivision/Emu3, emu3/mllm/tokenization_emu3.py)
EMU3_TOKENS = {"[PAD]": "<|endoftext|>", "BOS": "<|extra_203|>", "EOS": "<|extra_204|>",
               "boi": "<|image start|>", "img": "<|image token|>", "EOL": "<|extra_200|>",
               "EOF": "<|extra_201|>", "eoi": "<|image end|>",
               "image codes": "<|visual token 000000|>"}  # the first of them


class HFText:
    """A text tokenizer of Hugging Face, for models with the published ids.

        HFText.from_pretrained("microsoft/phi-1_5", "showo")
        HFText.from_pretrained("BAAI/Emu3-Chat-hf", "emu3")

    showo: sot and eot are its bos and eos; [PAD], soi .. lvg and the image codes follow its last
    id (showlab/Show-o, training/prompting_utils.py). emu3: it has all special tokens itself, and
    ends with the image codes. ValueError for a tokenizer that lacks one of them.
    """
    merges = True  # a token may span the end of one text and the start of the next

    # Question and answer as Show-o was tuned on them (showlab/Show-o, inference_mmu.py and
    # llava/llava/conversation.py). Emu3's layout holds the question's form; the form of its
    # answers is not published.
    chats = {"showo": ("USER: \n{} ASSISTANT:", " {}"), "emu3": ("{}", " {}")}

    def __init__(self, tokenizer, backbone: str):
        if backbone not in ("showo", "emu3"):
            raise ValueError(f"HFText: backbone must be showo or emu3, got {backbone!r}")
        self.tokenizer, self.backbone, self.stored = tokenizer, backbone, None
        names = EMU3_TOKENS
        if backbone == "showo":
            names = {"sot": tokenizer.bos_token, "eot": tokenizer.eos_token}
            if self.find("[PAD]") is not None:
                raise ValueError("HFText: this tokenizer has a [PAD] already, whose id is given "
                                 "out here: load it anew")
        ids = {name: self.find(token) for name, token in names.items()}
        lacking = [f"{name} ({names[name]})" for name, i in ids.items() if i is None]
        if lacking:
            raise ValueError(f"HFText: this tokenizer is not that of {backbone}, it lacks "
                             + ", ".join(lacking))
        self.size = ids.pop("image codes", len(tokenizer))
        self.special = ids

    def find(self, token: str | None) -> int | None:
        """The id of a token; None if there is none, which Hugging Face calls the unknown token."""
        if token is None:
            return None
        i, unknown = self.tokenizer.convert_tokens_to_ids(token), self.tokenizer.unk_token
        return None if token != unknown and i == self.tokenizer.unk_token_id else i

    def chat(self, question: str, answer: str = "") -> tuple[str, str]:
        """A question and an answer in the form that the published weights know."""
        question_form, answer_form = self.chats[self.backbone]
        return question_form.format(question), answer_form.format(answer)

    def encode(self, text: str) -> list:
        text.encode("utf-8")  # a ValueError if it is no Unicode
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids) -> str:
        return self.tokenizer.decode([i for i in ids if 0 <= i < self.size],
                                     skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def state(self) -> dict:
        """Plain data for from_state: its tokenizer.json and the names of three tokens.

        ValueError for a slow tokenizer, which has no tokenizer.json.
        """
        if getattr(self.tokenizer, "backend_tokenizer", None) is None:
            raise ValueError(f"a {type(self.tokenizer).__name__} cannot be stored: take a fast "
                             "tokenizer")
        if self.stored is None:
            names = ("bos_token", "eos_token", "unk_token")
            self.stored = {"json": self.tokenizer.backend_tokenizer.to_str(),
                           "names": {name: getattr(self.tokenizer, name) for name in names}}
        return self.stored

    @classmethod
    def from_state(cls, state: dict, backbone: str) -> "HFText":
        fast = transformers().PreTrainedTokenizerFast
        from tokenizers import Tokenizer as Backend  # comes with transformers
        names = {name: token for name, token in state["names"].items() if token is not None}
        text = cls(fast(tokenizer_object=Backend.from_str(state["json"]), **names), backbone)
        text.stored = state
        return text

    @classmethod
    def from_pretrained(cls, name: str, backbone: str) -> "HFText":
        """By its name, which downloads it, or from a folder. ValueError if there is none."""
        auto = transformers().AutoTokenizer
        try:
            tokenizer = auto.from_pretrained(name)
        except ImportError:
            raise
        except Exception as error:  # OSError, KeyError, the bare Exception of tokenizers
            reason = " ".join(str(error).split())
            raise ValueError(f"{name} is no tokenizer of Hugging Face: {reason}") from None
        text = cls(tokenizer, backbone)
        if not text.encode("a 16*16"):  # what it makes of a folder without tokenizer.json
            raise ValueError(f"{name} is no tokenizer of Hugging Face: it has no id for a letter")
        return text


def transformers():
    """The optional package."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"{error}; tokenizers of Hugging Face need it: pip install transformers"
                          ) from None
    return transformers


def shorten(text: str) -> str:
    """At most 100 characters of a text, for an error message."""
    return text if len(text) <= 100 else text[:100] + " .."
