"""Load an exported model with transformers, as anyone would, and let it answer.

python examples/demo/generate.py HF_DIR
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

directory = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(directory)
model = AutoModelForCausalLM.from_pretrained(directory)
chat = [{"role": "user", "content": "What does json.dumps do?"}]
inputs = tokenizer.apply_chat_template(
    chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
output = model.generate(
    **inputs, max_new_tokens=60, do_sample=False, pad_token_id=tokenizer.eos_token_id, repetition_penalty=1.2
)
rope = model.config.to_dict().get("rope_parameters", {})
print(f"{directory}: RoPE base {rope.get('rope_theta'):g}, context {model.config.max_position_embeddings}")
print("user:      What does json.dumps do?")
print("assistant:", tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
