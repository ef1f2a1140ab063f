"""What `otpo chat` is made of: speakers, each a model with its conversation, and the screen."""
