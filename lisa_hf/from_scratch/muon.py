"""Muon for the weight matrices, AdamW for everything else, as one optimizer.

Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/) updates a matrix by the same amount in all
directions. A randomly initialized model gains most: at first its prompts differ between questions in a few weak
directions only. AdamW finds them late, because it follows what all questions have in common.
"""

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer


class MuonAdamW(Optimizer):
    """[`torch.optim.Muon`] and [`torch.optim.AdamW`] behind one interface, for schedulers and checkpoints.

    Args:
        matrices: Two-dimensional parameters, updated by Muon.
        others: Parameter groups with their options, updated by AdamW.
        muon_lr: Learning rate of Muon.
        muon_weight_decay: Weight decay of Muon.
    """

    def __init__(self, matrices: list[nn.Parameter], others: list[dict], muon_lr: float, muon_weight_decay: float):
        self.muon = Muon([{"params": matrices, "name": "muon"}], lr=muon_lr, weight_decay=muon_weight_decay)
        self.adamw = AdamW([{**group, "name": "adamw"} for group in others])
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})
        self._share_groups()

    def _share_groups(self):
        # The same dicts as in the two optimizers, so that a scheduler's learning rates reach them.
        self.param_groups = self.muon.param_groups + self.adamw.param_groups

    @torch.no_grad()
    def step(self, closure=None):
        loss = self.muon.step(closure)
        self.adamw.step()
        return loss

    def state_dict(self) -> dict:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: dict):
        self.muon.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])
        self._share_groups()  # loading replaces the groups


def use_muon(optimizer: AdamW, model: nn.Module, learning_rate: float) -> MuonAdamW:
    """Return the same optimizer with Muon for the weight matrices that are trained in full.

    These are the weights of linear layers, except the vocabulary projection, which Muon's authors leave to AdamW like
    the embeddings, and except LoRA's.
    """
    head = model.get_output_embeddings()
    matrices = {
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and ".lora_" not in name
    }
    others, weight_decay = [], 0.0
    for group in optimizer.param_groups:
        if any(parameter in matrices for parameter in group["params"]):
            weight_decay = group["weight_decay"]
        others.append({**group, "params": [parameter for parameter in group["params"] if parameter not in matrices]})
    trained = [parameter for parameter in model.parameters() if parameter in matrices and parameter.requires_grad]
    return MuonAdamW(trained, [group for group in others if group["params"]], learning_rate, weight_decay)
