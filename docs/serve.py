"""A reward model behind Ray Serve: requests that arrive together are scored in one call.

pip install "rewardzip[ray]"
REWARD=reward/ serve run docs.serve:app
curl -d '{"state": [0, 0, 0], "action": [1]}' localhost:8000
"""

import asyncio
import os

import torch
from ray import serve
from starlette.requests import Request

import rewardzip as rz


@serve.deployment(max_ongoing_requests=1000)
class Reward:
    def __init__(self, folder: str) -> None:
        torch.set_num_threads(1)
        self.model = rz.load(folder, device="cuda" if torch.cuda.is_available() else None)

    @serve.batch(max_batch_size=1024, batch_wait_timeout_s=0.002)
    async def score(self, rows: list[dict[str, list[float]]]) -> list[float]:
        device = next(self.model.buffers()).device
        state, action = (torch.tensor([row[name] for row in rows], device=device) for name in ("state", "action"))
        with torch.no_grad():
            scores = await asyncio.to_thread(self.model, state, action)
        return scores.tolist()

    async def __call__(self, request: Request) -> dict[str, float]:
        return {"reward": await self.score(await request.json())}


app = Reward.bind(os.environ.get("REWARD", "reward/"))
