#!/usr/bin/env bash
# The whole recipe in small, on any machine: real text -> base model -> 1K -> 4K -> SFT -> Hugging Face -> evaluation.
# Every line is a command you would use for a real run. Run it with `make demo`; results land in demo/.
# QUICK=1 walks the same path with a handful of steps: what the tests run, too short to learn anything.
set -euo pipefail
cd "$(dirname "$0")/.."
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 TQDM_DISABLE=1
export CUDA_VISIBLE_DEVICES=""  # on CPU in fp32, with the same numbers on a machine that has GPUs

base_steps=() long_steps=() documents=12 trials=2
if [ -n "${QUICK:-}" ]; then
  base_steps=(stage.base.steps=20) long_steps=(stage.1k.steps=4 stage.4k.steps=2 stage.sft.steps=2) documents=2 trials=1
fi

SECONDS=0
say() { printf '\n\033[1m== %s\033[0m (%d s so far)\n' "$*" $SECONDS; }

say "1/6 real text from the Python installation, and a tokenizer trained on it"
rm -rf demo
python examples/demo/text.py demo
tokenizer=demo/tokenizer
prolong data tokenize demo/text/code demo/tokens/code --kind repositories --tokenizer $tokenizer
prolong data tokenize demo/text/books.jsonl demo/tokens/books --tokenizer $tokenizer
prolong data tokenize demo/text/short.jsonl demo/tokens/short --tokenizer $tokenizer
prolong data tokenize demo/text/chats.jsonl demo/tokens/chats --chat --tokenizer $tokenizer
prolong data tokenize demo/text/held_out demo/tokens/held_out --kind repositories --tokenizer $tokenizer
for length in 256 1024 4096; do
  for domain in code books; do
    prolong data pack demo/tokens/$domain demo/data/${domain}_$length --length $length --mode single
  done
  prolong data pack demo/tokens/short demo/data/short_$length --length $length --mode concat
done
prolong data pack demo/tokens/chats demo/data/chats_4096 --length 4096 --mode concat --intact

say "2/6 a base model with a context of 256 tokens, handed over in Hugging Face format"
prolong train examples/demo_base.yaml "${base_steps[@]}"
prolong convert to-hf demo/runs/base/base demo/base_hf

say "3/6 long-context training: 1K, then 4K (optimizer carried over), then SFT"
prolong train examples/demo.yaml "${long_steps[@]}"
prolong status demo/runs/long

say "4/6 export to Hugging Face"
prolong convert to-hf demo/runs/long/sft demo/runs/long/export

say "5/6 held-out loss by position, far beyond the base model's context; needles in a haystack"
prolong eval perplexity base=demo/base_hf --compare 1k=demo/runs/long/1k --compare 4k=demo/runs/long/4k \
  --data demo/tokens/held_out --lengths 256,1K,4K --documents $documents --out demo/runs/long/evaluation
prolong eval needle base=demo/base_hf --compare 4k=demo/runs/long/4k --lengths 256,1K --depths 0,50,100 \
  --trials $trials --out demo/runs/long/evaluation

say "6/6 the exported model in transformers, and the report"
python examples/demo/generate.py demo/runs/long/export
prolong report demo/runs/long
say "done; open demo/runs/long/report.html"
