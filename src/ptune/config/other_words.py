"""Names that PEFT, P-tuning v2 and transformers' Trainer have for what a setting here says. Knows no values."""

from __future__ import annotations

_SETTINGS = {
    "model.name": "model_name_or_path base_model_name_or_path pretrained_model_name_or_path model_name base_model "
    "backbone",
    "model.dtype": "torch_dtype fp16 bf16 half",
    "model.device": "device_map no_cuda use_cpu",
    "model.quantization": "load_in_8bit load_in_4bit quantization_config",
    "data.train": "train_file train_data train_path train_dataset dataset dataset_name",
    "data.dev": "validation_file eval_file dev_file eval_data dev_data eval_dataset validation_data",
    "data.dev_fraction": "validation_split validation_split_percentage test_size val_size",
    "data.limit": "max_train_samples max_samples",
    "data.dev_limit": "max_eval_samples",
    "task.type": "task_type",
    "task.max_new_tokens": "max_target_length generation_max_length max_gen_length",
    "prompt.encoder.type": "encoder_reparameterization_type prefix_projection reparameterization_type",
    "prompt.encoder.hidden_size": "encoder_hidden_size prefix_hidden_size",
    "prompt.encoder.num_layers": "encoder_num_layers",
    "prompt.encoder.dropout": "encoder_dropout hidden_dropout_prob",
    "prompt.start.method": "prompt_tuning_init",
    "prompt.start.text": "prompt_tuning_init_text init_text",
    "prompt.max_length": "max_seq_length max_seq_len max_source_length model_max_length cutoff_len block_size",
    "training.epochs": "num_train_epochs num_epochs epoch",
    "training.max_steps": "max_train_steps num_steps num_train_steps train_steps",
    "training.batch_size": "per_device_train_batch_size per_device_eval_batch_size per_gpu_train_batch_size "
    "train_batch_size bs",
    "training.gradient_accumulation_steps": "gradient_accumulation grad_accum accumulate_grad_batches",
    "training.learning_rate": "lr base_lr",
    "training.schedule": "lr_scheduler_type lr_scheduler scheduler",
    "training.warmup_ratio": "warmup warmup_steps num_warmup_steps",
    "training.max_grad_norm": "grad_clip gradient_clip_val clip_grad_norm",
    "training.seed": "data_seed random_seed",
    "training.evaluations": "eval_steps eval_strategy evaluation_strategy",
    "training.checkpoint_minutes": "save_steps save_strategy",
    "training.patience": "early_stopping_patience early_stopping",
    "training.trackers": "report_to log_with",
    "training.logging_steps": "logging_strategy",
    "training.shard_backbone": "fsdp",
    "output": "output_dir output_path save_dir logging_dir",
}
"""Setting -> the names that others have for it, between blanks."""

OTHER_WORDS = {word: setting for setting, words in _SETTINGS.items() for word in words.split()}
"""The last part of another's name -> the setting here."""

COUNTS: tuple[str, ...] = ("num_virtual_tokens", "num_prompt_tokens", "num_tokens", "n_tokens", "pre_seq_len", "psl")
COUNTS += ("prefix_length", "prefix_len", "prompt_length", "prompt_len", "soft_prompt_length", "length")
"""Names of the number of virtual tokens, which stands in the template."""

_OPTIONS = {"resume_from_checkpoint": "--resume", "overwrite_output_dir": "--overwrite"}


def own_word(name: str) -> str:
    """Return a sentence, a blank in front, on how to say here what others call ``name``; empty where nobody does.

    Args:
        name: of a setting, dotted or not, with dashes or underscores.
    """
    word = name.replace("-", "_").rpartition(".")[-1].lower()
    if word in COUNTS:
        return " For 20 virtual tokens write [P*20] in prompt.template."
    if word in OTHER_WORDS:
        return f' Here it is called "{OTHER_WORDS[word]}".'
    return f" Give {_OPTIONS[word]} on the command line." if word in _OPTIONS else ""
