"""The keys that SAELens writes into `cfg.json`, of version 6 and before."""

NEEDED = frozenset(
    {
        "apply_b_dec_to_input",
        "architecture",
        "d_in",
        "d_sae",
        "metadata",
        "normalize_activations",
        "reshape_activations",
    }
)
"""Of version 6."""
_INFERENCE = "d_out device dtype k rescale_acts_by_decoder_norm"
_TRAINING = """
aux_loss_coefficient decoder_init_norm jumprelu_bandwidth jumprelu_init_threshold jumprelu_sparsity_loss_mode
jumprelu_ste_to_input jumprelu_tanh_scale l0_coefficient l0_warm_up_steps l1_coefficient l1_warm_up_steps lp_norm
matryoshka_widths pre_act_loss_coefficient target_l0 topk_threshold_lr use_matryoshka_aux_loss use_sparse_activations
"""
_METADATA = """
context_size dataset_path dataset_trust_remote_code disable_concat_sequences exclude_special_tokens hf_hook_name
hf_hook_name_out hook_head_index hook_head_index_out hook_layer hook_layer_out hook_name hook_name_out
is_dataset_tokenized l0 model_class_name model_from_pretrained_kwargs model_name neuronpedia_id num_dead_features
prepend_bos sae_lens_training_version sae_lens_version seqpos_slice sequence_separator_token streaming
training_architecture training_architecture_details
"""
_FLAT = """
act_store_device activation_fn activation_fn_kwargs adam_beta1 adam_beta2 autocast autocast_lm b_dec_init_method
cached_activations_path checkpoint_path compile_llm compile_sae dead_feature_estimation_method dead_feature_threshold
dead_feature_window decoder_heuristic_init decoder_heuristic_init_norm decoder_orthogonal_init eval_batch_size_prompts
eval_every_n_wandb_logs expansion_factor feature_reinit_scale feature_sampling_method feature_sampling_window
finetuning_method finetuning_scaling_factor finetuning_tokens from_pretrained_path hook_eval
init_encoder_as_decoder_transpose llm_compilation_mode log_to_wandb lr lr_decay_steps lr_end lr_scheduler_name
lr_warm_up_steps model_kwargs mse_loss_normalization n_batches_in_buffer n_checkpoints n_eval_batches n_restart_cycles
noise_scale normalize_sae_decoder resample_batches resume run_name sae_compilation_mode
scale_sparsity_penalty_by_decoder_norm seed store_batch_size store_batch_size_prompts tokens_per_buffer
total_training_tokens train_batch_size train_batch_size_tokens training_tokens use_cached_activations use_ghost_grads
verbose wandb_entity wandb_id wandb_log_frequency wandb_project
"""

METADATA = frozenset(_METADATA.split())
KEYS = NEEDED.union(_INFERENCE.split(), _TRAINING.split())
"""At the top of version 6: what it computes and how it was trained, which changes nothing of that."""
FLAT_KEYS = KEYS.union(METADATA, _FLAT.split())
"""Before it, when everything stood side by side, at first with the whole configuration of the run."""
