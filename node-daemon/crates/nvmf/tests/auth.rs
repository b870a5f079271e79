//! DH-HMAC-CHAP: the machines against vectors that Python worked out on its own
//! (`node-daemon/tests/test_node_auth_vectors.py`), secrets as text, what is refused and when, and
//! whole associations over sockets.

#[path = "support/memory.rs"]
mod memory;
#[path = "support/raw.rs"]
mod raw;
mod support;

use raw::{ADMIN, ENABLED, HOST_NQN, IO, Raw, Reply, Rng, property_set, volume};
use serde_json::Value;
use sha2::{Digest, Sha256};
use tercet_nvmf::auth::{
    AuthEntry, Computation, FailureReason, Group, Initiator, RANDOM_BYTES, Responder, Secret,
    SecretError,
};
use tercet_nvmf::command::{Completion, Data, Entry, admin, fctype, io};
use tercet_nvmf::names::volume_nqn;
use tercet_nvmf::status::Status;
use tercet_nvmf::target::{Ana, CloseReason, ConnectionId, Keys, Refusal};

const VECTORS: &str = include_str!("auth-vectors.json");
/// `nvme gen-dhchap-key` has this form; 32, 48 and 64 bytes.
const SECRET: &str = "DHHC-1:00:AQIDBAUGBwgJCgsMDQ4PEBESExQVFhcYGRobHB0eHyAl7OaH:";

fn hex(text: &str) -> Vec<u8> {
    let byte = |at: usize| u8::from_str_radix(&text[at..at + 2], 16).expect("hexadecimal");
    (0..text.len()).step_by(2).map(byte).collect()
}

fn to_hex(bytes: &[u8]) -> String {
    let digit = |value: u8| char::from_digit(u32::from(value), 16).expect("a digit");
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

fn sha256(bytes: &[u8]) -> String {
    to_hex(&Sha256::digest(bytes))
}

fn secret(seed: u8) -> Secret {
    let vectors: Value = serde_json::from_str(VECTORS).expect("JSON");
    let text = &vectors["exchanges"][usize::from(seed)]["secrets"][0];
    text.as_str().expect("text").parse().expect("a secret")
}

#[test]
fn groups_are_those_of_the_formula() {
    let vectors: Value = serde_json::from_str(VECTORS).expect("JSON");
    for group in Group::ALL.into_iter().skip(1) {
        let prime = group.prime();
        assert_eq!(prime.len(), group.bytes());
        assert_eq!(vectors["primes_sha256"][(group as u8).to_string()], sha256(&prime));
    }
}

#[test]
fn exchanges_are_byte_for_byte_those_of_the_vectors() {
    let vectors: Value = serde_json::from_str(VECTORS).expect("JSON");
    let text = |value: &Value| value.as_str().expect("text").to_owned();
    let (host, subsystem) = (text(&vectors["host"]), text(&vectors["subsystem"]));
    let exchanges = vectors["exchanges"].as_array().expect("a list");
    assert_eq!(exchanges.len(), 18);
    for exchange in exchanges {
        let keys: Vec<Secret> = (0..2)
            .map(|index| text(&exchange["secrets"][index]).parse().expect("a secret"))
            .collect();
        let random: Vec<[u8; RANDOM_BYTES]> = (0..2)
            .map(|index| hex(&text(&exchange["random"][index])).try_into().expect("132 bytes"))
            .collect();
        let (mine, theirs) = (Some(keys[1].clone()), Some(keys[1].clone()));
        let mut responder = Responder::new(&host, &subsystem, keys[0].clone(), mine);
        let transaction = exchange["transaction"].as_u64().expect("a number") as u16;
        let mut initiator = Initiator::new(&host, &subsystem, keys[0].clone(), theirs, transaction);
        let negotiate = hex(&text(&exchange["negotiate"]));
        // The host offers everything; the vector's terms are one hash and one group.
        assert_eq!(initiator.message().expect("Negotiate")[..6], negotiate[..6]);
        let draw = responder.send(&negotiate).expect("a challenge is made");
        responder.computed(draw.run(&random[0]));
        let challenge = responder.receive().expect("a challenge");
        assert_eq!(exchange["challenge_sha256"], sha256(&challenge), "{exchange}");
        let answer = initiator.receive(&challenge).expect("it is answered");
        initiator.computed(&answer.run(&random[1]));
        let reply = initiator.message().expect("a reply");
        assert_eq!(exchange["reply_sha256"], sha256(&reply), "{exchange}");
        let check = responder.send(&reply).expect("it is checked");
        responder.computed(check.run(&[0; RANDOM_BYTES]));
        let success1 = responder.receive().expect("a success");
        assert_eq!(text(&exchange["success1"]), to_hex(&success1), "{exchange}");
        assert!(initiator.receive(&success1).is_none() && !responder.is_authenticated());
        let success2 = initiator.message().expect("a success");
        assert_eq!(text(&exchange["success2"]), to_hex(&success2));
        assert!(responder.send(&success2).is_none());
        assert!(initiator.is_done() && responder.is_authenticated());
    }
}

#[test]
fn secrets_are_read_as_they_are_written() {
    assert!(SECRET.parse::<Secret>().is_ok());
    assert!(format!("{SECRET}\n").parse::<Secret>().is_ok(), "a file's last line");
    let shown = format!("{:?}", SECRET.parse::<Secret>());
    assert_eq!(shown, "Ok(Secret(32 bytes, None))", "nothing of it is shown");
    let encoded = &SECRET[10..SECRET.len() - 1];
    for (text, error) in [
        (String::new(), SecretError::Form),
        (encoded.to_owned(), SecretError::Form),
        (SECRET[..SECRET.len() - 1].to_owned(), SecretError::Form),
        (SECRET.replace("DHHC-1", "DHHC-2"), SecretError::Form),
        (SECRET.replace(":00:", ":04:"), SecretError::Hash),
        (SECRET.replace(":00:", ":0:"), SecretError::Hash),
        (SECRET.replace('A', "*"), SecretError::Base64),
        (SECRET.replace("AQID", "AQI"), SecretError::Base64),
        (SECRET.replace("AQID", ""), SecretError::Length),
        (SECRET.replace("AQID", "AQIE"), SecretError::Crc),
        (format!("DHHC-1:00:{}:", "AQID".repeat(200)), SecretError::Length),
    ] {
        assert_eq!(text.parse::<Secret>(), Err(error), "{text}");
    }
}

fn pair(secret: &Secret) -> (Responder, Initiator) {
    let nqn = volume_nqn(volume());
    (
        Responder::new(HOST_NQN, &nqn, secret.clone(), None),
        Initiator::new(HOST_NQN, &nqn, secret.clone(), None, 7),
    )
}

/// Runs an exchange to its end; what each side drew.
fn run(responder: &mut Responder, initiator: &mut Initiator) {
    let compute = |computation: Computation| computation.run(&[5; RANDOM_BYTES]);
    for _ in 0..10 {
        if let Some(message) = initiator.message() {
            if let Some(computation) = responder.send(&message) {
                responder.computed(compute(computation));
            }
        } else if initiator.wants_message() && responder.failure().is_none() {
            let message = responder.receive().expect("a message");
            if let Some(computation) = initiator.receive(&message) {
                initiator.computed(&compute(computation));
            }
        }
    }
}

#[test]
fn another_secret_another_host_or_another_subsystem_is_refused() {
    let nqn = volume_nqn(volume());
    let other_nqn = "nqn.2026-11.io.tercet:volume:other";
    for (secret_of_host, host, subsystem) in [
        (secret(1), HOST_NQN, nqn.as_str()),
        (secret(0), "nqn.x", &nqn),
        (secret(0), HOST_NQN, other_nqn),
    ] {
        let mut responder = Responder::new(HOST_NQN, &nqn, secret(0), None);
        let mut initiator = Initiator::new(host, subsystem, secret_of_host, None, 7);
        run(&mut responder, &mut initiator);
        assert_eq!(responder.failure(), Some(FailureReason::Failed));
        assert_eq!(initiator.failure(), Some(FailureReason::Failed));
        assert!(!responder.is_authenticated() && !initiator.is_done());
    }
    let (mut responder, mut initiator) = pair(&secret(0));
    run(&mut responder, &mut initiator);
    assert!(responder.is_authenticated() && initiator.is_done());
}

#[test]
fn a_host_that_asks_for_the_controllers_secret_is_shown_the_right_one() {
    let nqn = volume_nqn(volume());
    for (controllers, expected) in
        [(Some(secret(1)), true), (Some(secret(2)), false), (None, false)]
    {
        let mut responder = Responder::new(HOST_NQN, &nqn, secret(0), controllers);
        let mut initiator = Initiator::new(HOST_NQN, &nqn, secret(0), Some(secret(1)), 7);
        run(&mut responder, &mut initiator);
        assert_eq!((initiator.is_done(), responder.is_authenticated()), (expected, expected));
        assert_eq!(initiator.failure().is_some(), !expected);
    }
}

#[test]
fn messages_that_are_not_due_or_not_whole_are_refused_and_never_believed() {
    let mut rng = Rng(1);
    for case in 0..2_000 {
        let (mut responder, mut initiator) = pair(&secret(0));
        let (mut is_changed, mut is_broken) = (false, false);
        for _ in 0..8 {
            let Some(mut message) = initiator.message().or_else(|| {
                if !initiator.wants_message() || responder.failure().is_some() {
                    return None;
                }
                let message = responder.receive()?;
                if let Some(computation) = initiator.receive(&message) {
                    initiator.computed(&computation.run(&[5; RANDOM_BYTES]));
                }
                initiator.message()
            }) else {
                break;
            };
            // Null group: quick. Then one bit, or the end, of what the host says.
            if message[1] == 0 {
                message[11] = 1;
                message[42] = 0;
            }
            if rng.one_in(3) && message[1] != 0 {
                is_changed = true;
                if rng.one_in(3) {
                    message.truncate(rng.below(message.len()));
                    is_broken = true;
                } else {
                    let at = rng.below(message.len().min(16 + 64));
                    message[at] ^= 1 << rng.below(8);
                    is_broken |= at >= 16;
                }
            }
            if let Some(computation) = responder.send(&message) {
                responder.computed(computation.run(&[6; RANDOM_BYTES]));
            }
        }
        let believes = responder.is_authenticated();
        // Bits that mean nothing may be anything (reserved ones, CVALID's upper seven).
        assert!(is_changed || believes, "case {case}");
        assert!(!(is_broken && believes), "case {case}: a response that is none");
    }
}

#[test]
fn public_values_of_small_subgroups_are_refused() {
    let group = Group::Ffdhe2048;
    let mut last = group.prime();
    *last.last_mut().expect("not empty") -= 1;
    let number = |value: u8| {
        let mut number = vec![0; group.bytes()];
        number[group.bytes() - 1] = value;
        number
    };
    for public in [number(0), number(1), last, group.prime(), vec![0xff; group.bytes()]] {
        let (mut responder, mut initiator) = pair(&secret(0));
        let mut negotiate = initiator.message().expect("Negotiate");
        (negotiate[11], negotiate[42]) = (1, group as u8);
        let draw = responder.send(&negotiate).expect("a challenge");
        responder.computed(draw.run(&[5; RANDOM_BYTES]));
        let challenge = responder.receive().expect("a challenge");
        let answer = initiator.receive(&challenge).expect("an answer");
        initiator.computed(&answer.run(&[6; RANDOM_BYTES]));
        let mut reply = initiator.message().expect("a reply");
        let at = reply.len() - group.bytes();
        reply[at..].copy_from_slice(&public);
        let check = responder.send(&reply).expect("it is checked");
        responder.computed(check.run(&[0; RANDOM_BYTES]));
        assert!(responder.receive().is_some() && !responder.is_authenticated());
        assert_eq!(responder.failure(), Some(FailureReason::Payload));
    }
}

fn keys(seed: u8, controller: Option<u8>) -> Keys {
    Keys { host: secret(seed), controller: controller.map(secret) }
}

/// A target whose host has a secret, the host connected.
fn asked() -> (Raw, u16) {
    let mut raw = Raw::new();
    raw.target.set_keys(volume(), [(HOST_NQN.to_owned(), keys(0, None))].into());
    let (done, _) = raw.join(ADMIN, &volume_nqn(volume()), HOST_NQN, 0, 0xffff);
    assert!(done.status.is_success());
    assert_eq!(done.result >> 16, 0b10, "AUTHREQ.ATR");
    (raw, done.result as u16)
}

fn send(raw: &mut Raw, id: ConnectionId, message: &[u8]) -> Completion {
    let bytes = message.len() as u32;
    let entry = AuthEntry::to_entry(fctype::AUTHENTICATION_SEND, 3, bytes, Data::InCapsule(bytes));
    raw.call(id, entry, message).0
}

fn receive_entry() -> Entry {
    AuthEntry::to_entry(fctype::AUTHENTICATION_RECEIVE, 4, 4096, Data::Transport(4096))
}

fn authenticate(raw: &mut Raw, id: ConnectionId, secret: Secret) -> Initiator {
    let nqn = volume_nqn(volume());
    let mut initiator = Initiator::new(HOST_NQN, &nqn, secret, None, 9);
    while initiator.failure().is_none() && !initiator.is_done() {
        if let Some(message) = initiator.message() {
            assert!(send(raw, id, &message).status.is_success());
        } else {
            let (done, message) = raw.call(id, receive_entry(), &[]);
            assert!(done.status.is_success());
            if let Some(computation) = initiator.receive(&message) {
                initiator.computed(&computation.run(&[5; RANDOM_BYTES]));
            }
        }
    }
    initiator
}

#[test]
fn nothing_else_is_done_on_a_queue_before_it_is_authenticated() {
    let (mut raw, cntlid) = asked();
    assert!(raw.hosts.is_empty(), "H3: the executor does not hear of it");
    for entry in [property_set(ENABLED), Entry::new(admin::KEEP_ALIVE, 1)] {
        assert_eq!(raw.call(ADMIN, entry, &[]).0.status, Status::AUTHENTICATION_REQUIRED);
    }
    let (early, _) = raw.join(IO, &volume_nqn(volume()), HOST_NQN, 1, cntlid);
    assert_eq!(early.status, Status::SEQUENCE_ERROR);
    assert!(authenticate(&mut raw, ADMIN, secret(0)).is_done());
    assert_eq!(raw.hosts.len(), 1);
    assert!(raw.call(ADMIN, property_set(ENABLED), &[]).0.status.is_success());
    // Each queue for itself.
    let id = ConnectionId(3);
    let (done, _) = raw.join(id, &volume_nqn(volume()), HOST_NQN, 1, cntlid);
    assert!(done.status.is_success() && done.result >> 16 == 0b10);
    let mut flush = Entry::new(io::FLUSH, 1);
    flush.set_nsid(1);
    assert_eq!(raw.call(id, flush, &[]).0.status, Status::AUTHENTICATION_REQUIRED);
    assert!(authenticate(&mut raw, id, secret(0)).is_done());
    assert!(raw.call(id, flush, &[]).0.status.is_success());
    // And again, whenever a host likes to.
    assert!(authenticate(&mut raw, id, secret(0)).is_done());
}

#[test]
fn who_does_not_know_the_secret_ends_no_association_and_is_told_why() {
    let (mut raw, _) = asked();
    assert!(authenticate(&mut raw, ADMIN, secret(0)).is_done());
    let impostor = ConnectionId(8);
    let (done, _) = raw.join(impostor, &volume_nqn(volume()), HOST_NQN, 0, 0xffff);
    assert!(done.status.is_success());
    let failure = authenticate(&mut raw, impostor, secret(1)).failure();
    assert_eq!(failure, Some(FailureReason::Failed));
    assert_eq!(raw.closed.get(&impostor), Some(&CloseReason::Authentication));
    assert_eq!((raw.hosts.len(), raw.closed.len()), (1, 1));
    assert_eq!(raw.target.usage().associations, 1);
    // Who says nothing is closed in time.
    let silent = ConnectionId(9);
    raw.join(silent, &volume_nqn(volume()), HOST_NQN, 0, 0xffff);
    raw.wait(std::time::Duration::from_millis(4_900));
    assert!(raw.call(ADMIN, property_set(ENABLED), &[]).0.status.is_success());
    raw.wait(std::time::Duration::from_millis(200));
    assert!(raw.closed.contains_key(&silent) && !raw.closed.contains_key(&ADMIN));
}

#[test]
fn a_host_that_is_authenticated_and_not_allowed_is_closed() {
    let (mut raw, _) = asked();
    raw.refusal = Some(Refusal::NotAllowed);
    authenticate(&mut raw, ADMIN, secret(0));
    assert_eq!(raw.closed.get(&ADMIN), Some(&CloseReason::Ended));
    assert_eq!(raw.target.usage(), tercet_nvmf::target::Usage::default());
}

#[test]
fn a_message_that_is_not_there_yet_is_waited_for() {
    let (mut raw, _) = asked();
    raw.random = None;
    let nqn = volume_nqn(volume());
    let mut initiator = Initiator::new(HOST_NQN, &nqn, secret(0), None, 9);
    let negotiate = initiator.message().expect("Negotiate");
    assert!(send(&mut raw, ADMIN, &negotiate).status.is_success());
    raw.send(ADMIN, receive_entry(), &[]);
    assert!(raw.take(ADMIN).is_empty(), "the power is being raised elsewhere");
    let (id, computation) = raw.computations.pop().expect("asked for");
    let mut effects = Vec::new();
    let computed = computation.run(&[1; RANDOM_BYTES]);
    raw.target.computed(id, computed, raw.now, &mut effects);
    raw.execute(effects);
    assert!(matches!(raw.take(ADMIN)[..], [Reply::Data(4, _), Reply::Completion(_)]));
    // Its result may come when the connection has gone.
    let (mut raw, _) = asked();
    raw.random = None;
    send(&mut raw, ADMIN, &negotiate);
    raw.close(ADMIN);
    let (id, computation) = raw.computations.pop().expect("asked for");
    let mut effects = Vec::new();
    raw.target.computed(id, computation.run(&[1; RANDOM_BYTES]), raw.now, &mut effects);
    assert!(effects.is_empty());
}

#[test]
fn commands_of_other_security_protocols_are_refused() {
    let (mut raw, _) = asked();
    let mut entry = receive_entry();
    entry.0[43] = 0xea;
    assert_eq!(raw.call(ADMIN, entry, &[]).0.status, Status::INVALID_FIELD);
    let mut entry = receive_entry();
    entry.set_dword(11, 4092);
    assert_eq!(raw.call(ADMIN, entry, &[]).0.status, Status::INVALID_FIELD, "AL is not the SGL's");
    let mut raw = Raw::live();
    assert_eq!(raw.call(ADMIN, receive_entry(), &[]).0.status, Status::INVALID_FIELD);
}

mod over_sockets {
    use super::{keys, secret};
    use crate::support::client::{Client, options, run, until};
    use crate::support::{Node, volume};
    use tercet_nvmf::host::Operation;
    use tercet_proto::BlockRange;

    use super::Ana;

    fn node(controller: Option<u8>) -> Vec<Node> {
        let mut node = Node::new(0, 64, Ana::Optimized);
        node.target.set_keys(volume(), [(nqn(), keys(0, controller))].into());
        vec![node]
    }

    fn nqn() -> String {
        options(&[]).host_nqn
    }

    #[test]
    fn the_user_space_host_authenticates_in_one_direction_or_in_both() {
        for both in [false, true] {
            let mut nodes = node(both.then_some(1));
            let mut options = options(&nodes);
            options.io_queues = 2;
            options.secret = Some(secret(0));
            options.controller_secret = both.then(|| secret(1));
            let mut client = Client::new(options);
            until(&mut nodes, &mut client, "it is let in", |_, client| client.geometry.is_some());
            let range = BlockRange { start: 0, count: 1 };
            run(&mut nodes, &mut client, Operation::Read(range)).expect("read");
        }
    }

    #[test]
    fn a_wrong_secret_on_either_side_keeps_the_host_out() {
        for (host, controllers, expected, why) in [
            (Some(1), None, None, "authentication failed"),
            (None, None, None, "there is no secret"),
            (Some(0), Some(2), Some(1), "authentication failed"),
        ] {
            let mut nodes = node(controllers);
            let mut options = options(&nodes);
            options.secret = host.map(secret);
            options.controller_secret = expected.map(secret);
            let mut client = Client::new(options);
            until(&mut nodes, &mut client, why, |_, client| {
                client
                    .path_events
                    .iter()
                    .any(|(_, _, said)| said.as_deref().is_some_and(|said| said.contains(why)))
            });
            assert!(client.geometry.is_none() && nodes[0].hosts.is_empty());
        }
    }

    #[test]
    fn a_controller_that_does_not_ask_is_none_for_who_expects_it_to_show_itself() {
        let mut nodes = vec![Node::new(0, 64, Ana::Optimized)];
        let mut options = options(&nodes);
        options.secret = Some(secret(0));
        options.controller_secret = Some(secret(1));
        let mut client = Client::new(options);
        until(&mut nodes, &mut client, "it is refused", |_, client| {
            client.path_events.iter().any(|(_, _, said)| {
                said.as_deref().is_some_and(|said| said.contains("does not authenticate itself"))
            })
        });
    }
}
