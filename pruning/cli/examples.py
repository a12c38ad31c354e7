"""What stands below the options in the help of a command: how it is used, and what it is for."""

OUTCOMES = """Tables go to stdout, progress to stderr. --json FILE writes the numbers, --json -
prints them and nothing else.

exit codes:
  0    done
  1    a written export is not what was meant
  2    something to mend: an option, a file, a text, the disk; the message says what
  70   a fault of the program, with a traceback to report
  75   another process that shares the work has ended; the same command goes on
  130  interrupted

moe-compress COMMAND --help says more, with examples."""
EXAMPLES = {
    "compress": "moe-compress compress demo --output demo-out\n"
    "  moe-compress compress ./Qwen3-30B-A3B --calibration c4.txt code.jsonl=0.5 "
    "\\\n      --prune-rate 0.25 --output out\n"
    "  moe-compress compress ./Qwen3-30B-A3B --weights-only --output preview\n\n"
    "An interrupted run goes on when it is repeated. The result is in out/report.html.\n"
    "The rule that prunes is measured on windows of the calibration text that are not scored,\n"
    "in about half of the time of scoring; --planner fair, or any part of a rule, spares that.",
    "inspect": "moe-compress inspect ./Qwen3-30B-A3B",
    "estimate": "moe-compress estimate demo --prune-rate 0.25 0.5\n"
    "  moe-compress estimate ./Qwen3-30B-A3B --export padded-int4 --tensor-parallel 2\n\n"
    "Takes the flags of `compress`: write `estimate` instead and see, before work: parameters,\n"
    "bytes per format, memory, disk and time, and which program loads which format and why.\n"
    "Nothing is written and no text is read; of the weights, headers are checked and one layer is\n"
    "timed. What `compress` would refuse about the model or the options is refused here.",
    "score": "moe-compress score ./Qwen3-30B-A3B --calibration c4.txt --output out\n\n"
    "Every option of `compress` is taken: those of planning and export are stored in\n"
    "out/recipe.yaml, where `plan` and `export` begin from.",
    "plan": "moe-compress plan out --prune-rate 0.25 0.5\n"
    "  moe-compress plan out --prune-rate 0.25 0.5 --planner fair\n\n"
    "With planner auto the model is read, and every rate has the rule that loses least there;\n"
    "plans of one planner need the statistics alone and lie within each other.\n"
    "Several rates also write out/sweep.csv and out/sweep.html: the size of every export format\n"
    "against the share of the channel score that goes. `eval` with them measures the loss.",
    "export": "moe-compress export out --export ragged-int4 padded-bf16\n"
    "  moe-compress export out --cut-router --export ragged-int4\n\n"
    "--cut-router takes experts that the plan empties out of the router, too: their tokens go to\n"
    "others, which is another model than the one measured before. plan.json says so afterwards.",
    "apply": "moe-compress apply plans/0.25 ./Qwen3-30B-A3B --export ragged-int4 --output out\n\n"
    "A plan is two small files, plan.json and plan.safetensors, so that one machine can choose\n"
    "the channels and another one, which has the weights, can cut them. Nothing is scored: 4-bit\n"
    "weights are rounded to nearest. Sizes and free space are checked first, every export is read\n"
    "back and verified; `verify out` and `eval out/exports/ragged-int4` take the result.\n"
    "Plans with bits of each layer (compare --bits auto) and of merged experts (compare --merge)\n"
    "are written in the same way.",
    "verify": "moe-compress verify out",
    "recover": "moe-compress recover out --text train.jsonl --tokens 10M --output recovered\n"
    "  moe-compress recover out --text train.jsonl --quantize-aware \\\n"
    "      --export ragged-int4 --output recovered\n\n"
    "All weights of the experts, the default, brought back most where it was measured, and are\n"
    "six numbers in memory for each weight; adapters (--train dora) are a small part of that;\n"
    "routers alone (--train router) are the least to train and bring back little. For an int4\n"
    "export add --quantize-aware. Train on text like that of the model's work;\n"
    "keep out of it the texts on which the result is to be measured.\n"
    "The dense model runs once over the text and what it predicts is kept in a file; then the\n"
    "student, or adapters of it, learn that. A model that does not fit in memory is trained layer\n"
    "by layer with --mode layer. The same command goes on after an interruption. Read\n"
    "recovered/recover.html first: how much of the loss that pruning added is left.",
    "eval": "moe-compress eval out/exports/ragged-int4 --text test.txt --json quality.json\n"
    "  moe-compress eval out --prune-rate 0.25 0.5 --text test.txt --json sweep.json\n\n"
    "Several rates also write out/sweep.csv and out/sweep.html: size against added loss.\n\n"
    "  moe-compress eval out --tasks arc_easy,hellaswag --limit 500\n"
    "  moe-compress eval demo --tasks 'demo_*' --task-path demo --output judged\n\n"
    "--tasks asks lm-evaluation-harness, with the questions, tokens and measures of its `hf`\n"
    "model, and writes what it writes: out/tasks/MODEL/results_*.json, samples_*.jsonl. Beside\n"
    "the harness's table comes one against the dense model: the difference of accuracies, its\n"
    "error on the same documents, how many answers flipped, and whether that is within noise.\n"
    "Documents come from the network or the cache of `datasets` (HF_HUB_OFFLINE=1: the cache\n"
    "alone), or from your own files with --task-path. The same command goes on after an\n"
    "interruption: what was answered stays in out/tasks/answers.",
    "report": "moe-compress report out",
    "audit": "moe-compress audit demo --experts 64 --channels 64 --output audit-out\n"
    "  moe-compress audit ./Qwen3-30B-A3B --calibration c4.txt --gradients --nll-ig 4 "
    "\\\n      --output out\n"
    "  moe-compress audit out --experts 32\n\n"
    "A score is a guess at what an expert or channel is worth. The audit takes a random sample of\n"
    "them out of the model, one at a time, and measures how much the loss on calibration text\n"
    "rises: once with the expert's output set to zero, once with its tokens sent to others.\n"
    "It then says how well each score ranks the sample (Spearman correlation: 1 is perfect, 0 no\n"
    "better than chance), so that you can choose --attribution and --criterion for your model.\n"
    "Only scores whose statistics were collected are judged: --gradients, --expert-details,\n"
    "--weight-gradients and --nll-ig add more. An interrupted audit goes on where it stopped.\n"
    "Read audit.html first; audit.csv has a row for each expert and channel.\n\n"
    "--layers-alone prunes each layer alone, and says whether layers whose score a few channels\n"
    "hold (Gini, channels that hold 90 % of it) lose less.",
    "compare": "moe-compress compare demo --prune-rate 0.25 0.5 --output rules\n"
    "  moe-compress compare ./OLMoE-1B-7B --calibration c4.txt --evaluation test.txt \\\n"
    "      --rules 'fair*' 'uniform*' random --gradients --expert-details --output rules\n\n"
    "Which pruning rule loses least on this model? Scores the model once, plans every rule at the\n"
    "same number of kept channels, and measures all plans on text that was not used for scoring,\n"
    "by masking: no pruned model is written. Prints a ranked table and writes compare.html,\n"
    "compare.csv and compare.json to the output folder. The same command goes on after an\n"
    "interruption. A rule's name says allocation and channel score, e.g. fair-energy;\n"
    "experts-NAME removes whole experts. Differences below the spread of random mean nothing.\n"
    "--repair adds a line for every rule, NAME+layer, repaired without training on the\n"
    "calibration text.\n\n"
    "  moe-compress compare demo --rules fair-shapley random --bits 4 8 16 --target-bytes 5MB \\\n"
    "      --output bytes\n\n"
    "Fewer bits or fewer channels? --bits gives a line for each: 4 bits alone, pruning alone,\n"
    "both; --target-bytes lets each rule remove what its bits leave it to remove at that size.\n"
    "--bits auto chooses channels and bits of each layer at that size; apply writes its plans,\n"
    "which are in the output folder under auto/.\n\n"
    "--top-k 4 2 and --skip-below 0.1 measure the whole model with fewer experts for each token,\n"
    "and the page sets all rows against the weights that a token reads: narrower experts save\n"
    "memory and some reading, fewer of them reading alone.\n\n"
    "--merge all adds the baselines that merge experts and drop none: hc-smoe, hc-smoe-aligned,\n"
    "m-smoe and ream, at the prune rates of the rules, as plans under merged/ that apply writes;\n"
    "--cut-router adds NAME+cut for each rule\n"
    "that drops whole experts: tokens go to others instead, as publications have it.\n\n"
    "--calibration-sets web=web.txt,code=code.jsonl,maths=maths.jsonl scores each text alone and\n"
    "measures what it keeps on all of them: what a model loses that is pruned for other work.\n\n"
    "--draws 3 says what chance in the calibration text does: errors of losses and differences.",
    "paper": "moe-compress paper demo --recover-tokens 30K --tasks 'demo_*' --task-path demo \\\n"
    "      --output paper\n"
    "  moe-compress paper Qwen/Qwen1.5-MoE-A2.7B --download --calibration c4.jsonl \\\n"
    "      --evaluation wikitext.txt --tasks arc_challenge,arc_easy,hellaswag,piqa,winogrande \\\n"
    "      --recover-text train.jsonl --output paper\n\n"
    "The protocol of arXiv 2606.18304: a quarter and half of the channels gone, 16 and 4 bits;\n"
    "its rule, ours (what planner auto takes, repaired), the best rule that drops whole experts,\n"
    "one width for all; each as it is pruned and after training. Read paper/paper.html first: the\n"
    "tables, accuracy or loss over rate (figure 9), and how fast a layer of the model is on this\n"
    "machine at widths that are multiples of 1 to 128 (figure 10). paper.md and paper.csv have\n"
    "the same numbers. One pass over the calibration text serves all rows; paper/compare is a\n"
    "folder of `compare`, paper/recovered/RULE-RATE are those of `recover`, with exports.\n"
    "The same command goes on after an interruption; more --rules, rates or tasks add to what is\n"
    "there. Before a large model: `estimate` with the same options, and --recover none.",
    "completion": "source <(moe-compress completion bash)  # this bash; also in ~/.bashrc\n"
    "  moe-compress completion zsh > ~/.zfunc/_moe-compress  # a folder of your $fpath\n"
    "  moe-compress completion fish > ~/.config/fish/completions/moe-compress.fish",
}
