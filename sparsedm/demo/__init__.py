"""The Gradio app's rooms: what each tab checks, computes and says. `app.py` opens it; nothing else imports it."""
