//! The way to a state in words: one line for each step.

use tercet_proto::message::{Message, PairMessage, ReplicaMessage};
use tercet_proto::{Entry, Place};

use crate::local::{Book, name};
use crate::store::write_of;
use crate::world::Action;

fn place(place: Place) -> String {
    format!("{}.{}", place.epoch, place.lsn)
}

fn entry(entry: &Entry) -> String {
    let what = write_of(&entry.header.kind).map_or("no-op".to_owned(), |n| format!("write {n}"));
    format!("{what} at {}", place(entry.header.place))
}

fn said(message: &Message) -> String {
    use ReplicaMessage::{Ack, Append, Fetch, Fetched, Newer, Refuse, Seal, Sealed};
    match message {
        Message::Pair(_, PairMessage::BeatAnswer { grant, exclusions, .. }) => {
            format!("grant {grant}, {} volumes excluded", exclusions.len())
        }
        Message::Pair(_, message) => format!("{message:?}"),
        Message::Replica(about, message) => {
            let what = match message {
                Append { prev, commit, entries } => {
                    let list: Vec<_> = entries.iter().map(entry).collect();
                    let (prev, commit) = (place(*prev), place(*commit));
                    format!("append after {prev} [{}], committed {commit}", list.join(", "))
                }
                Ack { length, matched, commit } => {
                    format!("ack {length}, matched {matched}, heard of commit {commit}")
                }
                Refuse { named, hint, .. } => {
                    format!("refuse {}, mine is {}", place(*named), place(*hint))
                }
                Seal { .. } => "seal".to_owned(),
                Sealed(tail) => format!("sealed, tail {}", place(tail.tail)),
                Newer { config } => format!("newer: epoch {}", config.epoch),
                Fetch { after } => format!("fetch after {}", place(*after)),
                Fetched { after, entries, .. } => {
                    let list: Vec<_> = entries.iter().map(entry).collect();
                    format!("fetched after {}: [{}]", place(*after), list.join(", "))
                }
                other => format!("{other:?}"),
            };
            format!("epoch {}: {what}", about.epoch)
        }
    }
}

/// A step in words.
pub fn told(action: &Action, book: &Book) -> String {
    match action {
        Action::Deliver(packet) => {
            let known = book.packets.get(*packet);
            let (route, message) = &*known;
            format!("{} <- {}: {}", name(route.to), name(route.from), said(message))
        }
        Action::Tick(i) => format!("{} tries again", name(*i)),
        Action::Beat { holder, granter } => {
            format!("{} <- {}: beat, and its answer", name(*granter), name(*holder))
        }
        Action::Flush(i) => format!("{}: the oldest operation is durable", name(*i)),
        Action::Crash(i, kept) => format!("{} ends; {kept} operations still land", name(*i)),
        Action::Start { node, wiped: false } => format!("{} starts", name(*node)),
        Action::Start { node, wiped: true } => format!("{} starts on an empty disk", name(*node)),
        Action::Stand(i) => format!("{} stands", name(*i)),
        Action::Write(i) => format!("a host writes at {}", name(*i)),
        Action::Swap { index, lost: false } => format!("API: swap {index} is executed"),
        Action::Swap { index, lost: true } => format!("API: swap {index}, its answer is lost"),
        Action::Read(i) => format!("{} reads the object", name(*i)),
        Action::Observe(i, version) => format!("{} is shown value {version}", name(*i)),
        Action::HandOver(i) => format!("{} is asked to hand over", name(*i)),
        Action::Restore(version) => format!("the object returns to value {version}"),
        Action::Elapse => "a lease's time goes by".to_owned(),
    }
}
