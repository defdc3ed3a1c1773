"""What a trained model's exits are good for: text from any of them, and how good each is."""
