"""What `otpo pairs` alone needs: its options, and the model, prompts and judge that they name."""
