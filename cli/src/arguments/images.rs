//! Verbs for images and registries; docker's short ones, and `image` with the same by its noun.

use clap::{Arg, Command};

use super::{format, switch, value};

/// The verbs.
pub fn commands() -> Vec<Command> {
    vec![
        listing("images"),
        load(),
        save(),
        removal("rmi"),
        pull(),
        tag(),
        login(),
        logout(),
        noun(),
    ]
}

fn noun() -> Command {
    Command::new("image")
        .about("Verbs for images by their noun")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommands([
            listing("ls").visible_alias("list"),
            load(),
            save(),
            removal("rm").visible_alias("remove"),
            pull(),
            tag(),
            Command::new("inspect")
                .about("Tell all about images, as JSON")
                .args([format(), images("name")]),
            Command::new("prune")
                .about("Remove images that no container uses")
                .args([
                    switch("all", Some('a'), "Those with names too"),
                    switch("force", Some('f'), "Do not ask"),
                ]),
        ])
}

fn images(name: &'static str) -> Arg {
    Arg::new(name)
        .value_name("IMAGE")
        .required(true)
        .num_args(1..)
}

fn image(name: &'static str, placeholder: &'static str) -> Arg {
    Arg::new(name).value_name(placeholder).required(true)
}

fn listing(name: &'static str) -> Command {
    Command::new(name).about("List images").args([
        switch("quiet", Some('q'), "Only ids"),
        switch("no-trunc", None, "Do not shorten"),
        format(),
    ])
}

fn load() -> Command {
    Command::new("load")
        .about("Load images from an OCI layout or an archive")
        .args([
            value(
                "input",
                Some('i'),
                "PATH",
                "A directory or archive [default: standard input]",
            ),
            switch("quiet", Some('q'), "Print nothing"),
        ])
}

fn save() -> Command {
    Command::new("save")
        .about("Write images to an archive, for load, docker and podman")
        .args([
            value(
                "output",
                Some('o'),
                "FILE",
                "Where to [default: standard output]",
            ),
            images("image"),
        ])
}

fn removal(name: &'static str) -> Command {
    Command::new(name).about("Remove images").args([
        switch(
            "force",
            Some('f'),
            "With all names and although containers that have ended use it",
        ),
        images("image"),
    ])
}

fn pull() -> Command {
    Command::new("pull")
        .about("Fetch an image from a registry")
        .args([
            switch("quiet", Some('q'), "Print only its name"),
            value(
                "platform",
                None,
                "OS/ARCH",
                "There is \"linux/amd64\", the host's",
            ),
            image("image", "NAME[:TAG|@DIGEST]"),
        ])
}

fn tag() -> Command {
    Command::new("tag")
        .about("Give an image a further name")
        .args([image("image", "IMAGE"), image("name", "NAME[:TAG]")])
}

fn login() -> Command {
    Command::new("login")
        .about("Check and keep credentials for a registry")
        .args([
            value("username", Some('u'), "NAME", "User name"),
            value("password", Some('p'), "PASSWORD", "Password or token")
                .conflicts_with("password-stdin"),
            switch(
                "password-stdin",
                None,
                "Read the password from standard input",
            ),
            server(),
        ])
}

fn logout() -> Command {
    Command::new("logout")
        .about("Forget the credentials for a registry")
        .arg(server())
}

fn server() -> Arg {
    Arg::new("server")
        .value_name("HOST[:PORT]")
        .help("The registry [default: docker.io]")
}
