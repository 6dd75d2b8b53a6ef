"""Models and prompt sets of the Hugging Face Hub."""
