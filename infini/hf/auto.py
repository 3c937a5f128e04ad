"""Tells transformers' Auto classes about this library; importing it is all."""

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from infini.hf.byte_tokenizer import InfiniByteTokenizer
from infini.hf.config import InfiniHFConfig
from infini.hf.model import InfiniForCausalLM

AutoConfig.register("infini", InfiniHFConfig, exist_ok=True)
AutoModelForCausalLM.register(InfiniHFConfig, InfiniForCausalLM, exist_ok=True)
AutoTokenizer.register(InfiniHFConfig, fast_tokenizer_class=InfiniByteTokenizer, exist_ok=True)
