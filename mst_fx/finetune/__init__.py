"""``mst-fx finetune``: fine-tune a causal language model at a long context from one command.

The flags are those of Transformers' ``TrainingArguments`` and of ``arguments.py``. The same under launchers:
``torchrun -m mst_fx.finetune ...`` and ``accelerate launch -m mst_fx.finetune ...``.

Steps, each in a file of its own: ``arguments`` (the command line), ``checks`` (what can't work is said before anything
is loaded), ``attention`` (which kernel), ``data`` (full-length sequences), ``train`` (model, Trainer, log, plot).
"""
