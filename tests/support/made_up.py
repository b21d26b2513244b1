"""A causal family that no list knows: its own argument for the cache, its own mask, and faults on demand."""

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput


class MadeUpConfig(PreTrainedConfig):
    model_type = "made_up"
    vocab_size: int = 60
    hidden_size: int = 32
    num_hidden_layers: int = 5
    num_attention_heads: int = 4
    fault: str = "none"
    tie_word_embeddings: bool = False
    is_causal: bool = True


class Attention(nn.Module):
    def __init__(self, config, number):
        super().__init__()
        self.config, self.number = config, number
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, allowed, kv_store):
        rows, length, width = x.shape
        heads = self.config.num_attention_heads
        q, k, v = (
            part.view(rows, length, heads, -1).transpose(1, 2) for part in self.qkv_proj(x).split(width, dim=-1)
        )
        own = k, v
        if kv_store is not None:
            if self.config.fault == "asks" and type(kv_store) is not DynamicCache:
                kv_store.running_average(self.number)
            k, v = kv_store.update(k, v, self.number)
        if self.config.fault == "ignores the cache" and k.shape[2] > length:
            k, v, allowed = *own, allowed[..., -length:]
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        if self.config.fault == "wrong when long" and k.shape[2] > max(length, 24):
            out = out * 1.01
        if self.config.fault == "nan" and k.shape[2] > length:
            out = out * float("nan")
        if self.config.fault == "wrong by 1e-2" and k.shape[2] > length:
            out = out * 1.01
        return self.o_proj(out.transpose(1, 2).reshape(rows, length, width))


class Layer(GradientCheckpointingLayer):
    def __init__(self, config, number):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        self.attention = Attention(config, number)
        self.up_proj = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.down_proj = nn.Linear(2 * config.hidden_size, config.hidden_size)

    def forward(self, x, allowed=None, kv_store=None):
        x = x + self.attention(self.norm(x), allowed, kv_store)
        return x + self.down_proj(torch.tanh(self.up_proj(self.norm(x))))


class MadeUpPreTrained(PreTrainedModel):
    config_class = MadeUpConfig
    config: MadeUpConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Layer"]

    def _init_weights(self, module):
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.2)


class MadeUpModel(MadeUpPreTrained):
    def __init__(self, config):
        super().__init__(config)
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.places = nn.Embedding(128, config.hidden_size)
        self.blocks = nn.ModuleList([Layer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.tokens

    def forward(self, input_ids, attention_mask=None, position_ids=None, kv_store=None, use_cache=False, **kwargs):
        if self.config.fault == "no cache, please" and kv_store is not None:
            raise NotImplementedError("this family has no use for a cache")
        if use_cache and kv_store is None:
            kv_store = DynamicCache()
        past = kv_store.get_seq_length() if kv_store is not None else 0
        rows, length = input_ids.shape
        if position_ids is None:
            position_ids = torch.arange(past, past + length, device=input_ids.device)[None]
        query = torch.arange(past, past + length, device=input_ids.device)
        key = torch.arange(past + length, device=input_ids.device)
        allowed = (key[None, :] <= query[:, None])[None, None].expand(rows, 1, -1, -1)
        if self.config.fault == "sees ahead":
            allowed = torch.ones_like(allowed)
        if attention_mask is not None:
            allowed = allowed & attention_mask[:, None, None, : past + length].bool()
        elif position_ids.shape[1] > 1 and not past:  # packed documents
            document = position_ids.eq(0).cumsum(1)
            allowed = allowed & (document[:, None, :, None] == document[:, None, None, :])
        allowed = allowed | (key[None, :] == query[:, None])  # padding sees itself
        x = self.tokens(input_ids) + self.places(position_ids)
        if self.config.fault == "random" and length > 10:
            x = x + 0.01 * torch.randn_like(x)
        for block in self.blocks:
            x = block(x, allowed=allowed, kv_store=kv_store)
            if self.config.fault == "mixes rows":
                x = x + x.mean(dim=0, keepdim=True)
        outputs = BaseModelOutput(last_hidden_state=self.norm(x))
        if kv_store is not None:
            outputs["kv_store"] = kv_store
        return outputs


class MadeUpForCausalLM(MadeUpPreTrained, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.backbone = MadeUpModel(config)
        self.to_words = nn.Linear(config.hidden_size, config.vocab_size, bias=True)
        self.post_init()

    def get_output_embeddings(self):
        return self.to_words

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, labels=None, **kwargs):
        outputs = self.backbone(input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)
        logits = 3 * torch.tanh(self.to_words(outputs.last_hidden_state / 2))  # a rule of its own
        if self.config.fault == "head by position":
            logits = logits + torch.arange(logits.shape[1])[None, :, None]
        return CausalLMOutput(logits=logits)


def made_up_model(fault="none"):
    torch.manual_seed(7)
    model = MadeUpForCausalLM(MadeUpConfig(fault=fault)).eval()
    if fault == "nan in the base":
        model.backbone.blocks[2].up_proj.weight.data[3, 4] = float("nan")
    return model
