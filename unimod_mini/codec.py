"""Texts and pictures as ids from 0, and back: what a Tokenizer puts into one vocabulary.

    texts:     WordText, ByteText                     .size, .encode(str) -> list, .decode(ids) -> str
               HFText, a tokenizer of Hugging Face    the same, with .special: ids that it has already
    pictures:  Palette, vq.VQ                         .n_codes, .patch, .encode(pixels) -> codes, .decode(codes)
               Codes, for pictures that are codes     the same, with codes in place of pixels

Legend: B pictures, H and W pixels, h and w rows and columns of image codes, p patch side.
"""

import difflib

import torch
from torch import Tensor

# --------------------------------------------------------------------------------------------------------------
# Texts
# --------------------------------------------------------------------------------------------------------------

class WordText:
    """Ids for a fixed list of words, separated by blanks. decode(encode(x)) is x up to runs of blanks."""

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


# tokens of Emu3's own vocabulary (baaivision/Emu3, emu3/mllm/tokenization_emu3.py), the first image code among them
EMU3_TOKENS = {"[PAD]": "<|endoftext|>", "BOS": "<|extra_203|>", "EOS": "<|extra_204|>", "boi": "<|image start|>",
               "img": "<|image token|>", "EOL": "<|extra_200|>", "EOF": "<|extra_201|>", "eoi": "<|image end|>",
               "image codes": "<|visual token 000000|>"}


class HFText:
    """A text tokenizer of Hugging Face as the text codec of a Tokenizer, whose ids are then those that were published.

        HFText.from_pretrained("microsoft/phi-1_5", "showo")     # or HFText(its tokenizer as it is, no token added, ..)
        HFText.from_pretrained("BAAI/Emu3-Chat-hf", "emu3")

    showo: sot and eot are its bos and eos, [PAD], soi .. lvg and the image codes follow behind its last id
    (showlab/Show-o, training/prompting_utils.py). emu3: all special tokens are among its own, the image codes end it.
    Raises ValueError for a tokenizer that lacks one of them.
    """
    merges = True                                          # a token may span the end of one text and the next's start
    # around a question and an answer: what Show-o was tuned on (showlab/Show-o, inference_mmu.py and
    # llava/llava/conversation.py). Emu3's question stands in its layout; how its answers began is not published
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
        """Plain data from which `from_state` makes it again: its tokenizer.json and the names of three tokens.

        The same in every version of Transformers. ValueError for a slow tokenizer, which has no such file.
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
        """By its name (it is downloaded) or from a folder. ValueError when there is none, or an empty one."""
        auto = transformers().AutoTokenizer
        try:
            tokenizer = auto.from_pretrained(name)
        except ImportError:
            raise
        except Exception as error:                         # OSError, KeyError, the bare Exception of tokenizers ..
            raise ValueError(f"{name} is no tokenizer of Hugging Face: {' '.join(str(error).split())}") from None
        text = cls(tokenizer, backbone)
        if not text.encode("a 16*16"):                     # what Transformers makes of a folder without tokenizer.json
            raise ValueError(f"{name} is no tokenizer of Hugging Face: it has no id for a letter")
        return text


def transformers():
    """The optional package."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"{error}; tokenizers of Hugging Face need it: pip install transformers") from None
    return transformers


# --------------------------------------------------------------------------------------------------------------
# Pictures
# --------------------------------------------------------------------------------------------------------------

class Palette:
    """Image codes are the nearest of n fixed patches, (n, p, p, 3) uint8. Exact for images made of those patches."""

    def __init__(self, patches):
        self.patches = torch.as_tensor(patches, dtype=torch.uint8)
        shape = self.patches.shape
        if len(shape) != 4 or 0 in shape or shape[1] != shape[2] or shape[3] != 3:
            raise ValueError(f"Palette: patches must be (n, p, p, 3), got {tuple(shape)}")
        if (self.patches != torch.as_tensor(patches)).any():
            raise ValueError("Palette: patches must be whole numbers from 0 to 255: multiply shares by 255 and round")
        self.n_codes, self.patch = shape[:2]

    def encode(self, images: Tensor) -> Tensor:
        """images uint8 (B, H, W, 3) -> codes long (B, H/p, W/p). ValueError when H or W is no multiple of p."""
        vectors = cut_patches(images.to(self.patches.device), self.patch)    # (B, h, w, 3 p p)
        return nearest(vectors.flatten(0, 2), self.patches.flatten(1).float()).view(vectors.shape[:3])

    def decode(self, codes: Tensor) -> Tensor:
        """codes long (B, h, w) -> images uint8 (B, h p, w p, 3). ValueError for a code outside [0, n_codes)."""
        check_codes(codes, self.n_codes)
        (B, h, w), p = codes.shape, self.patch
        patches = self.patches[codes.to(self.patches.device)]                # (B, h, w, p, p, 3)
        return patches.transpose(2, 3).reshape(B, h * p, w * p, 3)

    @classmethod
    def fit(cls, images: Tensor, n_codes: int = 256, patch: int = 2, rounds: int = 10, seed: int = 0) -> "Palette":
        """k-means on the patches of real images (uint8 (B, H, W, 3)); empty clusters restart at random patches.

        ValueError for n_codes or patch below 1, and for images that do not divide into patches.
        """
        if n_codes < 1 or patch < 1:
            raise ValueError(f"Palette.fit: n_codes and patch must be at least 1, got {n_codes} and {patch}")
        h, w = cut_patches(images[:1], patch).shape[1:3]                     # raises what does not fit
        patches = images.unflatten(2, (w, patch)).unflatten(1, (h, patch)).transpose(2, 3)   # a view (B, h, w, p, p, 3)
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(images) * h * w, generator=generator)[:50_000]
        vectors = patches[torch.unravel_index(chosen, patches.shape[:3])].flatten(1).float()           # (M, 3 p p)
        centres = vectors.unique(dim=0)
        centres = centres[torch.randperm(len(centres), generator=generator)[:n_codes]]
        for _ in range(rounds):
            owner = nearest(vectors, centres)
            count = torch.bincount(owner, minlength=len(centres))
            mean = torch.zeros_like(centres).index_add_(0, owner, vectors) / count.clamp(min=1)[:, None]
            fresh = vectors[torch.randint(len(vectors), (len(centres),), generator=generator)]
            centres = torch.where(count[:, None] > 0, mean, fresh)
        return cls(centres.round().view(-1, patch, patch, 3))


class Codes:
    """Pictures that are codes of a tokenizer which is not here (Show-o's MAGVIT-v2, Emu3's): encode and decode leave
    them as they are. Pixels are the caller's."""
    patch = 1

    def __init__(self, n_codes: int):
        if n_codes < 1:
            raise ValueError(f"Codes: n_codes must be at least 1, got {n_codes}")
        self.n_codes = n_codes

    def encode(self, codes: Tensor) -> Tensor:
        """Integers (B, h, w) -> the same as long. ValueError for pixels and for a code outside [0, n_codes)."""
        if codes.dim() != 3 or codes.is_floating_point():
            raise ValueError(f"this tokenizer knows pictures as integer codes (B, h, w), got {codes.dtype} "
                             f"{tuple(codes.shape)}: encode pixels with the tokenizer that the codes are of")
        check_codes(codes.long(), self.n_codes)
        return codes.long()

    decode = encode


def cut(text: str) -> str:
    """What an error quotes of a text: 100 characters."""
    return text if len(text) <= 100 else text[:100] + " .."


def nearest(vectors: Tensor, centres: Tensor) -> Tensor:
    """argmin_c |v - c|^2, (M,) long; in pieces, so that the distances stay below 2^22 numbers."""
    step = max(1, 2**22 // len(centres))
    return torch.cat([torch.cdist(part, centres, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
                      for part in vectors.split(step)])


def cut_patches(images: Tensor, patch: int) -> Tensor:
    """uint8 (B, H, W, 3) -> float (B, H/p, W/p, 3 p p)."""
    if images.dim() != 4 or images.shape[3] != 3 or images.dtype != torch.uint8 or 0 in images.shape:
        raise ValueError(f"images must be uint8 (B, H, W, 3), got {images.dtype} {tuple(images.shape)}")
    B, H, W, _ = images.shape
    if H % patch or W % patch:
        raise ValueError(f"images of {H}x{W} pixels do not divide into patches of {patch}: resize them")
    return images.reshape(B, H // patch, patch, W // patch, patch, 3).transpose(2, 3).flatten(3).float()


def check_codes(codes: Tensor, n_codes: int) -> None:
    if codes.dtype != torch.long or codes.dim() != 3:
        raise ValueError(f"image codes must be long (B, h, w), got {codes.dtype} {tuple(codes.shape)}: .long() converts "
                         "other integers, codes[None] is a batch of one")
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= n_codes):
        raise ValueError(f"image codes lie in [{int(codes.min())}, {int(codes.max())}], expected [0, {n_codes})")
