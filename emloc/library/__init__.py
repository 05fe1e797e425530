"""The calls for a training script of your own: models in memory, PEFT, any trainer.

emulator = emloc.build_emulator(model, batches, ratio=0.25)
tuned = get_peft_model(emulator, LoraConfig(...))
...                                      # train `tuned` with anything
emloc.correct(tuned, model, emulator).save("adapter")
model = PeftModel.from_pretrained(model, "adapter")

`emloc.anchor(model, tuned, rows, collate)` before the training puts the emulator back onto its
original.
"""
