mod broken;
mod commands;
mod events;
mod real;
mod server;
