"""A reward model behind Ray Serve: requests that arrive together are scored in one call.

REWARD=reward/ serve run docs.serve:app
curl -d '{"state": [0, 0, 0], "action": [1, 0]}' localhost:8000
"""

import asyncio
import os

import torch
from ray import serve
from starlette.requests import Request
from torch import Tensor

import rewardzip as rz


@serve.deployment(max_ongoing_requests=1000)
class Reward:
    def __init__(self, folder: str) -> None:
        torch.set_num_threads(1)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = rz.load(folder, device=self.device).requires_grad_(False)

    @serve.batch(max_batch_size=1024, batch_wait_timeout_s=0.002)
    async def score(self, rows: list[tuple[Tensor, ...]]) -> list[float]:
        inputs = [torch.stack(column).to(self.device) for column in zip(*rows, strict=True)]
        return (await asyncio.to_thread(self.model, *inputs)).tolist()

    async def __call__(self, request: Request) -> dict[str, float]:
        body = await request.json()
        row = tuple(torch.tensor(body[name], dtype=torch.float32) for name in ("state", "action"))
        if [len(x) for x in row] != [self.model.state_dim, self.model.action_dim]:
            raise ValueError(f"{[len(x) for x in row]} numbers")  # here, not in the batch: it is this request's alone
        return {"reward": await self.score(row)}


app = Reward.bind(os.environ.get("REWARD", "reward/"))
