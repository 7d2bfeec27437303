"""Small text encoders with random weights, and a padded batch for them."""

import torch
import transformers

from small_models import spread

_COMMON = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
}
_CONFIGS = {
    "bert": lambda: transformers.BertConfig(**_COMMON),
    "roberta": lambda: transformers.RobertaConfig(**_COMMON),
    "electra": lambda: transformers.ElectraConfig(embedding_size=32, **_COMMON),
    "distilbert": lambda: transformers.DistilBertConfig(
        vocab_size=60, dim=32, n_layers=4, n_heads=4, hidden_dim=64, max_position_embeddings=40
    ),
}
TEXT = tuple(_CONFIGS)


def text(kind, seed=0, task=transformers.AutoModel, **options):
    torch.manual_seed(seed)
    config = _CONFIGS[kind]()
    for name, value in options.items():
        setattr(config, name, value)
    return spread(task.from_config(config))


def batch(lengths=(24, 15, 9), seed=0):
    """Ids and mask of texts of these lengths, padded on the right."""
    ids = torch.randint(5, 60, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}
