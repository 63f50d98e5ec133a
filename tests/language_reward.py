"""A small language-model reward, built and trained with no download: sentences are good if their words are."""

import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForSequenceClassification

SPECIAL = ["[PAD]", "[EOS]"]
GOOD, BAD = ["good", "fine", "great"], ["bad", "awful", "dull"]
WORDS = [*SPECIAL, *GOOD, *BAD, "the", "a", "movie", "book", "was", "is"]
LENGTH = 12


def tokenizer() -> PreTrainedTokenizerFast:
    table = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[PAD]"))
    table.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=table, pad_token="[PAD]", eos_token="[EOS]", unk_token="[PAD]")


def config() -> Qwen2Config:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    heads = {"num_key_value_heads": 2, "max_position_embeddings": 64, "num_labels": 1, "pad_token_id": 0}
    return Qwen2Config(vocab_size=len(WORDS), **sizes, **heads)


def reward_model(head: bool = True) -> Qwen2ForSequenceClassification:
    model = Qwen2ForSequenceClassification(config())
    if head:
        model.score = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    return model


def sentence(share: float, rng: random.Random) -> str:
    """Words of which about this share of those that judge are good."""
    filler = [["the", "a"], ["movie", "book"], ["was", "is"]]
    judged = ((GOOD if rng.random() < share else BAD) for _ in range(LENGTH))
    return " ".join(rng.choice(filler[i % 4] if i % 4 < 3 else words) for i, words in enumerate(judged))


def pairs(count: int, seed: int) -> dict[str, list[str]]:
    """Preferences, also between sentences that are nearly as good as one another."""
    rng = random.Random(seed)
    shares = [sorted((rng.random(), rng.random())) for _ in range(count)]
    return {"chosen": [sentence(b, rng) for _, b in shares], "rejected": [sentence(a, rng) for a, _ in shares]}


def score(model: nn.Module, sentences: list[str]) -> torch.Tensor:
    tokens = tokenizer()(sentences, return_tensors="pt", padding=True)
    with torch.no_grad():
        return model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).logits[:, 0]


def learning_curve(reward: nn.Module, judge: nn.Module, seed: int, steps: int = 60, batch: int = 32) -> list[float]:
    """REINFORCE on a table of word probabilities by position: ``reward`` teaches, ``judge`` says how well it goes."""
    generator = torch.Generator().manual_seed(seed)
    policy = torch.zeros(LENGTH, len(WORDS) - len(SPECIAL), requires_grad=True)
    optimizer = torch.optim.Adam([policy], 0.1)
    curve = []
    for _ in range(steps):
        chances = policy.softmax(-1)
        words = torch.multinomial(chances.detach(), batch, replacement=True, generator=generator).T
        tokens = words + len(SPECIAL)
        with torch.no_grad():
            paid = reward(input_ids=tokens).logits[:, 0]
            curve.append(float(judge(input_ids=tokens).logits.mean()))
        chosen = chances.log().gather(1, words.T).T.sum(1)
        loss = -((paid - paid.mean()) / (paid.std() + 1e-6) * chosen).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return curve
