//! Stories that are told of the rules as they are, and once more with one broken.

use tercet_proto::Epoch;
use tercet_proto::message::{Message, ReplicaMessage};
use tercet_replication::Options;
use tercet_replication::api::HostCommand;

use super::{Cluster, at, block, host};

/// T4: a primary that does not know that the others have sealed for another still sends entries,
/// and nobody acknowledges them.
pub fn late_acknowledgement(customize: fn(&mut Options)) {
    let mut cluster = Cluster::with(3, 21, customize);
    cluster.create(0);
    cluster.run_until_served();
    let id = cluster.connect(0, host(1));
    cluster.write(0, id, 1, 5);
    cluster.run_ms(50);
    cluster.cut.insert((0, 0)); // nor does its agent tell it
    cluster.filter = Box::new(|from, to, message| {
        let entries = matches!(
            message,
            Message::Replica(_, ReplicaMessage::Append { .. } | ReplicaMessage::Ack { .. })
        );
        entries == (from == 0 || to == 0) // the new primary's own come later
    });
    cluster.run_ms(3000);
    for other in [1, 2] {
        assert_eq!(cluster.status(other).expect("running").epoch, Epoch(2), "sealed");
    }
    let token = cluster.command(0, id, HostCommand::Write(at(1), block(6)));
    cluster.run_ms(200);
    assert_eq!(cluster.done.get(&(id, token)), None, "the next primary has not got it");
}
