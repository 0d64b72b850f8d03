"""The Gradio app, a module for each tab. `app.py` opens the page; nothing else imports this folder."""
