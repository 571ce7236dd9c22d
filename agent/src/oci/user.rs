//! "USER[:GROUP]" as docker resolves it, by the container's own files.

use crate::failure::{Failure, Kind, Result};

/// Who a process runs as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    /// User ID.
    pub uid: u32,
    /// Primary group ID.
    pub gid: u32,
    /// Groups that list the user as a member, when no group was named.
    pub groups: Vec<u32>,
}

struct Account<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

fn accounts(passwd: &str) -> impl Iterator<Item = Account<'_>> {
    passwd.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        let home = fields.nth(1).unwrap_or("");
        Some(Account {
            name,
            uid,
            gid,
            home,
        })
    })
}

struct Group<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

fn groups(group: &str) -> impl Iterator<Item = Group<'_>> {
    group.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let gid = fields.nth(1)?.parse().ok()?;
        Some(Group {
            name,
            gid,
            members: fields.next().unwrap_or(""),
        })
    })
}

/// Resolves `user` by the text of /etc/passwd and /etc/group. A name wins over a number, a
/// number need not be in the files.
///
/// # Errors
/// [`Kind::NotFound`] with the name that is in neither file.
pub fn resolve(user: &str, passwd: &str, group: &str) -> Result<Resolved> {
    let (user, wanted_group) = match user.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
        None => (user, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    let number = user
        .parse::<u32>()
        .ok()
        .filter(|number| i32::try_from(*number).is_ok());
    let account = accounts(passwd)
        .find(|account| account.name == user)
        .or_else(|| accounts(passwd).find(|account| Some(account.uid) == number));
    let (uid, gid) = match (&account, number) {
        (Some(account), _) => (account.uid, account.gid),
        (None, Some(number)) => (number, 0),
        (None, None) => {
            return Err(Failure::new(
                Kind::NotFound,
                format!("unable to find user {user}: no matching entries in passwd file"),
            ));
        }
    };
    let Some(wanted) = wanted_group else {
        let extra = account.iter().flat_map(|account| {
            groups(group)
                .filter(|one| one.members.split(',').any(|member| member == account.name))
                .map(|one| one.gid)
        });
        return Ok(Resolved {
            uid,
            gid,
            groups: extra.collect(),
        });
    };
    let number = wanted
        .parse::<u32>()
        .ok()
        .filter(|number| i32::try_from(*number).is_ok());
    let gid = groups(group)
        .find(|one| one.name == wanted)
        .map(|one| one.gid)
        .or(number)
        .ok_or_else(|| {
            Failure::new(
                Kind::NotFound,
                format!("unable to find group {wanted}: no matching entries in group file"),
            )
        })?;
    Ok(Resolved {
        uid,
        gid,
        groups: Vec::new(),
    })
}

/// Home directory of `uid`.
pub fn home(uid: u32, passwd: &str) -> Option<String> {
    accounts(passwd)
        .find(|account| account.uid == uid)
        .map(|account| account.home.to_owned())
        .filter(|home| !home.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/sh\nbroken\nweb:x:33:34::/srv/web:/bin/sh\n1000:x:7:8::/n:\n";
    const GROUP: &str = "root:x:0:\nweb:x:34:\nlog:x:4:web,adm\n";

    #[test]
    fn names_numbers_and_groups() {
        let web = Resolved {
            uid: 33,
            gid: 34,
            groups: vec![4],
        };
        assert_eq!(resolve("web", PASSWD, GROUP), Ok(web.clone()));
        assert_eq!(resolve("33", PASSWD, GROUP), Ok(web));
        assert_eq!(
            resolve("web:log", PASSWD, GROUP).map(|r| (r.gid, r.groups)),
            Ok((4, vec![]))
        );
        assert_eq!(
            resolve("4711", PASSWD, GROUP).map(|r| (r.uid, r.gid)),
            Ok((4711, 0))
        );
        assert_eq!(
            resolve("1000", PASSWD, GROUP).map(|r| r.uid),
            Ok(7),
            "a name wins"
        );
        assert_eq!(resolve("5:6", "", "").map(|r| (r.uid, r.gid)), Ok((5, 6)));
        assert_eq!(home(33, PASSWD).as_deref(), Some("/srv/web"));
    }

    #[test]
    fn the_unknown() {
        let failure = resolve("nobody-here", PASSWD, GROUP).unwrap_err();
        assert_eq!(
            failure.message,
            "unable to find user nobody-here: no matching entries in passwd file"
        );
        assert!(resolve("web:nogroup", PASSWD, GROUP).is_err());
        assert!(resolve("4294967296", PASSWD, GROUP).is_err());
    }
}
