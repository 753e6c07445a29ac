"""Keys of the original Mellow's YAML files: those with another name or place here, and those that it never read.

Facts from the public repository soham97/mellow (config/*.yaml, training/trainer.py).
"""

# dotted key in a Mellow file -> dotted key here
RENAMED = {
    "train.optimizer.optimizer_type": "train.optimizer_type",
    "train.optimizer.learning_rate": "train.learning_rate",
    "train.optimizer.weight_decay": "train.weight_decay",
    "train.optimizer.scheduler": "train.scheduler",
    "train.random_seed": "train.seed",
    "train.log_step": "train.log_every_steps",
    "model.resume_checkpoint": "resume_checkpoint",
}

# dotted key that had no effect in Mellow -> what to use instead, for the one line that says so
NEVER_READ = {
    "model.decoder.prefix_length": "the number of audio tokens is model.encoder.audio_tokens",
    "model.decoder.total_prefix_length": "the sequence is as long as its content",
    "model.encoder.transformer_embed_dim": "",
    "model.model_type": "",
    "model.input_channels": "",
    "model.output_channels": "",
    "model.inference_window": "",
    "train.optimizer.warm_up_steps": "train.warmup_steps",
    "train.optimizer.reduce_lr_steps": "train.decay_steps",
    "train.emergency_stop_grad_norm": "",
    "train.loss_type": "",
    "train.num_nodes": "the launcher says how many",
    "train.persistent_data_workers": "loader processes live as long as the run",
    "train.sav_per_num_epochs": "train.save_every_steps",
    "gpu": "GPUs are used where there are any",
}
